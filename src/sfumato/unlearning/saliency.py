r"""Weight saliency: which weights a loss over the forget set asks to move.

.. math::
    s = \Big|\sum_{batches} \nabla_\theta \ell_f(\theta_0)\Big|, \qquad m = 1[\, s \ge \gamma \,],

with gamma the k-th largest saliency, k = ratio * N, over all weights at once (Fan et al., "SalUn", ICLR 2024, arXiv
2310.12508). Signed gradients are summed across batches and processes before the absolute value is taken.

The threshold is found without sorting: the bit pattern of a non-negative float32, read as an integer, keeps its order,
so one histogram of the upper 16 bits finds the bin that holds gamma and a second, of the lower 16 bits within that
bin, finds gamma exactly. Weights that tie with gamma are taken in order of position, so exactly k are chosen, the same
ones that a stable full sort would choose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfumato import storage

__all__ = ["kth_largest", "load_mask", "mask_density", "save_mask", "top_mask"]

_BINS = 1 << 16


def top_mask(saliency: Mapping[str, torch.Tensor], ratio: float) -> tuple[dict[str, torch.Tensor], float]:
    """Choose the weights with the largest saliency, over all tensors at once.

    Args:
        saliency: Parameter name to a non-negative float32 tensor.
        ratio: The share of weights to choose, in [0, 1]; exactly ``int(ratio * N)`` are.

    Returns:
        Parameter name to `bool` mask, on the saliency's device, and the threshold gamma (infinite if none is chosen).

    Raises:
        ValueError: If the ratio is outside [0, 1], or a saliency is NaN, infinite or negative.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"The mask ratio must lie in [0, 1], got {ratio}.")
    for name, values in saliency.items():
        if not (torch.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"The saliency of {name} has values that are NaN, infinite or negative.")
    wanted = int(ratio * sum(values.numel() for values in saliency.values()))
    if wanted == 0:
        return {name: torch.zeros_like(values, dtype=torch.bool) for name, values in saliency.items()}, float("inf")
    threshold, ties_wanted = _kth_largest(saliency, wanted)
    masks = {}
    for name, values in saliency.items():
        bits = _bits(values)
        chosen = bits > threshold
        tied = bits == threshold
        number = int(tied.sum())
        if number and ties_wanted:
            taken = tied & (tied.reshape(-1).cumsum(0) <= ties_wanted).view_as(tied)
            chosen |= taken
            ties_wanted -= min(number, ties_wanted)
        masks[name] = chosen
    return masks, float(torch.tensor(threshold, dtype=torch.int32).view(torch.float32))


def kth_largest(
    values: Mapping[str, torch.Tensor], k: int, add_up: Callable[[torch.Tensor], Any] | None = None
) -> float:
    """Find the k-th largest of all values, counted from 1, without sorting or joining the tensors.

    Args:
        values: Name to a non-negative float32 tensor. Each is asked for twice, and may be made when it is.
        k: From 1 to the number of values.
        add_up: Adds a tensor of counts up over the processes, if each has a part of the values.
    """
    return float(torch.tensor(_kth_largest(values, k, add_up)[0], dtype=torch.int32).view(torch.float32))


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Read non-negative float32 as int32, which keeps the order; adding 0 turns -0.0 into 0.0 first."""
    return (values.float() + 0.0).contiguous().view(torch.int32)


def _kth_largest(
    saliency: Mapping[str, torch.Tensor], k: int, add_up: Callable[[torch.Tensor], Any] | None = None
) -> tuple[int, int]:
    """Find the bit pattern of the k-th largest value, and how many values equal to it belong to the top k."""
    add_up = add_up or (lambda counts: counts)
    upper = add_up(_histogram(saliency, lambda bits: bits >> 16))
    high, left = _bin_from_top(upper, k)
    lower = add_up(_histogram(saliency, lambda bits: bits[(bits >> 16) == high] & 0xFFFF))
    low, ties = _bin_from_top(lower, left)
    return (high << 16) | low, ties


def _histogram(saliency: Mapping[str, torch.Tensor], select: Any) -> torch.Tensor:
    total = torch.zeros(_BINS, dtype=torch.int64)
    for values in saliency.values():
        total = total.to(values.device)
        total += torch.bincount(select(_bits(values).reshape(-1)), minlength=_BINS)
    return total


def _bin_from_top(counts: torch.Tensor, k: int) -> tuple[int, int]:
    """Find the bin in which the count from the top reaches k, and how many are still wanted within it."""
    above = counts.cpu().flip(0).cumsum(0)
    place = int(torch.searchsorted(above, torch.tensor(k)))
    before = int(above[place - 1]) if place else 0
    return _BINS - 1 - place, k - before


def mask_density(masks: Mapping[str, torch.Tensor]) -> float:
    """Give the share of weights that masks leave free to move."""
    return sum(int(mask.sum()) for mask in masks.values()) / max(1, sum(mask.numel() for mask in masks.values()))


def save_mask(path: str | Path, masks: Mapping[str, torch.Tensor], provenance: Mapping[str, Any]) -> Path:
    """Write masks as packed bits, one eighth of a byte a weight.

    Args:
        path: A ``.safetensors`` file; replaced if it exists.
        masks: Parameter name to `bool` mask.
        provenance: Where it comes from (base model's fingerprint, concept, ratio, threshold, seed, ...).

    Returns:
        The path.
    """
    packed = {name: torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1))) for name, mask in masks.items()}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    return storage.save_tensors(path, packed, {"format": "sfumato-mask-1", "shapes": shapes, **provenance})


def load_mask(
    path: str | Path, model: torch.nn.Module | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_mask` wrote.

    Args:
        path: The file.
        model: If given, the mask must name parameters of this module, in their shapes.

    Returns:
        Parameter name to `bool` mask, on the CPU, and the provenance.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is corrupt, not a mask, or of another model.
    """
    provenance = storage.read_metadata(path)
    if provenance.pop("format", None) != "sfumato-mask-1":
        raise ValueError(f"{path} is not a saliency mask; make one with method='salun'.")
    tensors, shapes = storage.load_tensors(path), provenance.pop("shapes", {})
    if set(shapes) != set(tensors):
        raise ValueError(f"{path} is damaged: it does not say the shapes of its masks; make another.")
    masks = {}
    for name, packed in tensors.items():
        size = int(np.prod(shapes[name]))
        masks[name] = torch.from_numpy(np.unpackbits(packed.numpy(), count=size).astype(bool)).view(shapes[name])
    if model is not None:
        own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        wrong = [name for name, mask in masks.items() if own.get(name) != tuple(mask.shape)]
        if wrong:
            raise ValueError(
                f"{path} is the mask of another model: {wrong[0]} is {tuple(masks[wrong[0]].shape)} there and "
                f"{own.get(wrong[0], 'missing')} here."
            )
    return masks, provenance
