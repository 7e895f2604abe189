"""The part of a model that a run changes: a copy of which only what is trained is its own.

A teacher, a bank of trajectories or an attack needs the original beside the model being trained. Weights that are not
trained are the same tensors in both, so that the second network costs its trained weights and not its size: 77 MB
beside Stable Diffusion 1.4 for keys and values of cross-attention, against 3.4 GB.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from sfumato.unlearning.adapters import add_adapters, merge_adapters
from sfumato.unlearning.pruning import prune
from sfumato.unlearning.task import Masks

__all__ = ["working_copy"]


@contextmanager
def working_copy(
    part: torch.nn.Module, names: Sequence[str], *, adapter_rank: int = 0, prune_ratio: float = 0.0, seed: int = 0,
    mixed: bool = False,
) -> Iterator[tuple[torch.nn.Module, Masks]]:  # fmt: skip
    """Copy a part of a model for training.

    While the context lasts, the copy shares with the original what is not trained, if nothing is pruned and that is
    float32, or `mixed`. When it ends, adapters are merged and the copy has all its weights for itself.

    Args:
        part: The original, which is not changed.
        names: Parameters to train.
        adapter_rank: Train adapters of this rank in their place, unless it is 0.
        prune_ratio: Share of the weights to set to zero first.
        seed: Seeds the adapters.
        mixed: Leave what is not trained in the dtype that it has: autocast will fit it to what is.

    Yields:
        The copy, in evaluation mode and float32, what is trained at least, in which the parameters to train require
        gradients, and masks of what was pruned.
    """
    needed_gradients = {name: parameter.requires_grad for name, parameter in part.named_parameters()}
    own = set() if adapter_rank else set(names)
    whole = all(parameter.dtype == torch.float32 for parameter in part.parameters())
    shares = (mixed or whole) and not prune_ratio
    shared = {id(p): p for name, p in part.named_parameters() if name not in own} if shares else {}
    copied = copy.deepcopy(part, dict(shared)).eval()
    if not shared and not whole:
        copied.float()
    try:
        for name, parameter in copied.named_parameters():
            parameter.requires_grad_(name in own)
        if adapter_rank:
            add_adapters(copied, names, adapter_rank, seed)
        for parameter in copied.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        yield copied, prune(copied, prune_ratio)
        for module in copied.modules():
            for name, value in list(module._parameters.items()):
                if value is not None and id(value) in shared:
                    module._parameters[name] = torch.nn.Parameter(value.detach().clone(), requires_grad=False)
        if adapter_rank:
            merge_adapters(copied)
    finally:
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(needed_gradients[name])
