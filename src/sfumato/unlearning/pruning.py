"""Prune first, then unlearn: the weights of least magnitude are set to zero, and stay there.

Jia et al., "Model Sparsity Can Simplify Machine Unlearning", NeurIPS 2023, arXiv 2304.04934, whose one-shot magnitude
pruning is carried over to diffusion: over the linear and convolution weights of the denoiser, all ranked together,
without the first and last convolutions and the time embedding. Classifiers stand 95 %; Stable Diffusion does not
recover from that without training, 30 to 60 % is what it takes.
"""

from __future__ import annotations

import torch

from sfumato.unlearning.saliency import top_mask

__all__ = ["prune"]

_SPARED = ("conv_in", "conv_out", "time_emb", "time_proj")


@torch.no_grad()
def prune(model: torch.nn.Module, ratio: float) -> dict[str, torch.Tensor]:
    """Set weights of least magnitude to zero, in place.

    Args:
        model: The network.
        ratio: Share of the weights that can be pruned, in [0, 1).

    Returns:
        Parameter name to a `bool` mask, False where a weight was pruned; empty if `ratio` is 0.
    """
    if ratio == 0:
        return {}
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    weights = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, layers) and not any(spared in name for spared in _SPARED)
    }
    kept, _ = top_mask({name: weight.abs() for name, weight in weights.items()}, 1 - ratio)
    for name, weight in weights.items():
        weight.masked_fill_(~kept[name], 0)
    return kept
