"""Weights that keep their bits through any optimiser: masks of updates, not only of gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sfumato.sharding import local, spread_like

__all__ = ["MaskedUpdate", "zero_where"]

_STRETCH = 1 << 17


class MaskedUpdate:
    """Keep masked-out weights bit-identical through any optimiser, by masking the update and not only the gradient.

    Gradients are masked before each step, so moments never learn of masked-out weights, and without weight decay and
    moments from elsewhere their update is an exact zero. Otherwise they are put back after each step; then only the
    masked-out values are kept, not a second copy of the model.

    Args:
        optimizer: The optimiser whose parameters are masked.
        masks: Parameter to `bool` tensor of its shape; False is frozen. Parameters without a mask train freely.
        restore: False masks the gradients alone: what else the optimiser does, as weight decay, moves every weight.

    Attributes:
        outside: Parameter to a `bool` tensor, True where it must not move, of what this process holds of it.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        masks: Mapping[torch.nn.Parameter, torch.Tensor],
        restore: bool = True,
    ) -> None:
        self.outside = {parameter: ~local(spread_like(mask, parameter)) for parameter, mask in masks.items()}
        optimizer.register_step_pre_hook(self._mask_gradients)
        if restore and (optimizer.state or any(group["weight_decay"] for group in optimizer.param_groups)):
            self._frozen = {parameter: local(parameter)[out].clone() for parameter, out in self.outside.items()}
            optimizer.register_step_post_hook(self._restore)

    def _mask_gradients(self, *_: Any) -> None:
        for parameter, outside in self.outside.items():
            if parameter.grad is not None:
                zero_where(local(parameter.grad), outside)

    @torch.no_grad()
    def _restore(self, *_: Any) -> None:
        for parameter, outside in self.outside.items():
            local(parameter).masked_scatter_(outside, self._frozen[parameter])


@torch.no_grad()
def zero_where(values: torch.Tensor, where: torch.Tensor) -> None:
    """Set values to zero, in place, where a `bool` tensor says so.

    On the CPU by their bit patterns, a stretch that the cache holds at a time: there `masked_fill_` branches at every
    entry, which for a mask without a pattern takes ten times as long.
    """
    if values.device.type != "cpu" or values.dtype != torch.float32 or not values.is_contiguous():
        values.masked_fill_(where, 0)
        return
    bits, flags = values.view(-1).view(torch.int32), where.reshape(-1).view(torch.int8)
    scratch = torch.empty(min(_STRETCH, bits.numel()), dtype=torch.int32)
    for some, chosen in zip(bits.split(_STRETCH), flags.split(_STRETCH), strict=True):
        kept = scratch[: len(some)].copy_(chosen).sub_(1)  # all bits where it is kept, none where not
        some.bitwise_and_(kept)
