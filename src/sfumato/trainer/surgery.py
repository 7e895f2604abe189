"""The gradients of an objective's terms, apart until the objective makes one of them: `SurgicalObjective`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from sfumato.sharding import local, spread_like, whole
from sfumato.trainer.config import TrainingConfig
from sfumato.trainer.masked_update import zero_where

__all__ = ["Surgeon", "check_surgery"]


def check_surgery(config: TrainingConfig, accelerator: Accelerator) -> None:
    """Refuse to combine gradients where there are no true ones to be had.

    Args:
        config: How to train.
        accelerator: The process group.

    Raises:
        ValueError: If fp16 scales them, or DeepSpeed has them for itself.
    """
    if config.mixed_precision == "fp16":
        raise ValueError(
            "Gradient surgery needs true gradients, which mixed_precision='fp16' scales: use bf16 or 'no'."
        )
    if accelerator.deepspeed_plugin is not None:
        raise ValueError(
            "Gradient surgery does not work with DeepSpeed, which has the gradients for itself: use "
            "training/launch/ddp.yaml or training/launch/fsdp2.yaml."
        )


class Surgeon:
    """Gathers the gradients of one step, and puts what the objective makes of them into `.grad`.

    Each is added up over the passes and averaged over the processes first: a combination of averages, not an average
    of combinations, so the number of processes does not change the result. Gradients of weights that are spread over
    processes are put together, so that the objective sees the same there.

    Args:
        objective: Combines the gradients.
        parameters: What is trained.
        accelerator: The process group.
        outside: Parameter to a `bool` tensor, True where it must not move and has no say.
        limit: What the norm of each gradient is clipped to.
        spread: Whether the parameters are spread over the processes, which then must meet in every pass.
    """

    def __init__(
        self, objective: Any, parameters: Sequence[torch.nn.Parameter], accelerator: Accelerator, *,
        outside: Mapping[torch.nn.Parameter, torch.Tensor], limit: float, spread: bool,
    ) -> None:  # fmt: skip
        self._objective, self._parameters, self._accelerator = objective, parameters, accelerator
        self._outside, self._limit, self.spread = outside, limit, spread
        self._gradients: dict[str, list[torch.Tensor]] = {}

    def add(self, terms: Mapping[str, torch.Tensor]) -> None:
        """Add the gradients of a pass; the terms share a graph."""
        for name, term in terms.items():
            parts = self._gradient_of(term.float())
            for parameter, part in zip(self._parameters, parts, strict=True):
                if parameter in self._outside:  # what can't move has no say in the surgery
                    zero_where(local(part), self._outside[parameter])
            if self.spread:
                parts = [whole(part) for part in parts]
            earlier = self._gradients.get(name)
            self._gradients[name] = parts if earlier is None else list(torch._foreach_add(earlier, parts))

    def _gradient_of(self, term: torch.Tensor) -> list[torch.Tensor]:
        """The gradient of this process's share of a batch, or, as FSDP2 gives it, of all shares."""
        found: Sequence[torch.Tensor | None]
        if not self.spread:
            found = torch.autograd.grad(term, self._parameters, retain_graph=True, allow_unused=True)
        else:
            self._accelerator.backward(term, retain_graph=True)
            found = [parameter.grad for parameter in self._parameters]
            for parameter in self._parameters:
                parameter.grad = None
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, found, strict=True)]

    def operate(self) -> float:
        """Combine the gradients into `.grad`; gives the norm of the result."""
        for name, parts in self._gradients.items():
            reduced = parts if self.spread else [self._accelerator.reduce(part, "mean") for part in parts]
            norm = torch.nn.utils.get_total_norm(reduced)
            self._gradients[name] = list(
                torch._foreach_mul(reduced, (self._limit / (norm + 1e-6)).clamp(max=1.0).item())
            )
        combined = self._objective.combine(self._gradients)
        self._gradients = {}
        for parameter, gradient in zip(self._parameters, combined, strict=True):
            # laid out as its weight is: fused optimisers on the CPU go through memory, whatever the strides
            parameter.grad = torch.empty_like(parameter)
            local(parameter.grad).copy_(local(spread_like(gradient, parameter)))
        return torch.nn.utils.get_total_norm(combined).item()
