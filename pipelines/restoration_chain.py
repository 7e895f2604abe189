"""The chain that a restoration network was trained on, as settings of its scheduler: it works on no other.

A scheduler may sample that chain in fewer steps, space them otherwise, clip or not: that changes nothing about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["TRAINED_WITH", "Chain"]

TRAINED_WITH = ("prediction_type", "num_train_timesteps")  # of every scheduler


@dataclass(frozen=True)
class Chain:
    """What of a scheduler's config a network is bound to, beside `TRAINED_WITH`.

    Attributes:
        settings: Their names.
        tables: Attributes of the scheduler that hold what the settings come to, where different ones may come to the
            same; empty where they never do.
    """

    settings: tuple[str, ...]
    tables: tuple[str, ...] = ()

    def of(self, scheduler: Any, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Give the settings, as JSON can hold them.

        Args:
            scheduler: The scheduler that those are taken of which are not known.
            known: Those of the scheduler that the network was trained with, as far as they are known.
        """
        config = {**getattr(scheduler, "config", {}), **(known or {})}
        return {name: _plain(config.get(name)) for name in self.settings}

    def check(self, scheduler: Any, trained: Mapping[str, Any]) -> None:
        """Raise a ValueError if a scheduler's chain is another than the one of the settings that `of` gave."""
        config = scheduler.config
        differing = [name for name in trained if _plain(config.get(name)) != trained[name]]
        if differing and not self._comes_to_the_same(scheduler, trained):
            raise_other(differing[0], trained[differing[0]], config.get(differing[0]))

    def _comes_to_the_same(self, scheduler: Any, trained: Mapping[str, Any]) -> bool:
        other = type(scheduler).from_config(scheduler.config, **trained)
        pairs = [(getattr(scheduler, table), getattr(other, table)) for table in self.tables]
        alike = [isinstance(one, Tensor) and torch.allclose(one, two, rtol=1e-4, atol=1e-8) for one, two in pairs]
        return bool(alike) and all(alike)


def raise_other(name: str, trained: Any, found: Any) -> None:
    """Refuse a scheduler for one of its settings."""
    raise ValueError(
        f"The network was trained with a scheduler of `{name}` {trained!r}, this one has {found!r}: keep the scheduler"
        " that came with the model."
    )


def _plain(value: Any) -> Any:
    return np.asarray(value).tolist() if isinstance(value, np.ndarray | list | tuple | Tensor) else value
