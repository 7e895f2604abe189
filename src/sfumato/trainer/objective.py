"""What a method minimises: all that the training loop knows of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

__all__ = ["Objective", "Shard", "StatefulObjective", "SurgicalObjective"]


@dataclass(frozen=True)
class Shard:
    """One of `count` equal slices of a global batch."""

    index: int
    count: int

    def of(self, size: int) -> range:
        """Give this shard's positions in a batch of `size` samples, which `count` must divide."""
        share = size // self.count
        return range(self.index * share, (self.index + 1) * share)


class Objective(Protocol):
    """What a method minimises; all that the loop knows of it."""

    batch_size: int

    def losses(self, model: torch.nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """Give the named terms of the loss, scalars whose sum is minimised, averaged over the shard.

        Args:
            model: The network being trained, wrapped by accelerate.
            step: The optimiser step, from 0.
            shard: The slice of the step's global batch to use.
        """
        ...


@runtime_checkable
class StatefulObjective(Protocol):
    """An objective that changes with the steps; `losses` itself must not change it."""

    def after_step(self, model: torch.nn.Module, step: int, shards: Sequence[Shard]) -> None:
        """Move on, once the optimiser has stepped.

        Args:
            model: The network being trained, wrapped by accelerate.
            step: The step just taken.
            shards: This process's slices of its batch, one for each accumulation pass.
        """
        ...

    def state(self) -> Mapping[str, torch.Tensor]:
        """Give all that changes, as tensors that are the state itself: resuming writes into them."""
        ...


@runtime_checkable
class SurgicalObjective(Protocol):
    """An objective that makes one gradient of those of its terms."""

    def combine(self, gradients: Mapping[str, list[torch.Tensor]]) -> list[torch.Tensor]:
        """Give the gradient to step with.

        Args:
            gradients: Term to its gradient over the whole batch, a tensor for each trained parameter, clipped to
                `max_grad_norm` each.
        """
        ...
