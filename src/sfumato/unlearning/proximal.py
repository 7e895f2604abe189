r"""Proximal unlearning: SalUn's relabelling, with a sparse change of weights instead of a mask chosen beforehand.

The loss is SalUn's, on the forget pictures under their captions c and substitutes c', and on the retain pictures:

.. math::
    L = E_{x \in D_f}\, \|\epsilon_\theta(x_t, c) - \mathrm{sg}[\epsilon_\theta(x_t, c')]\|^2
        + \alpha\, E_{x \in D_r}\, \|\epsilon - \epsilon_\theta(x_t, c_x)\|^2 .

After every step the change since the original weights is soft-thresholded,

.. math::
    \theta \leftarrow \theta_0 + \mathrm{sign}(\Delta)\, \max(|\Delta| - \tau, 0), \qquad \Delta = \theta - \theta_0 ,

with tau the (k+1)-th largest :math:`|\Delta|` over all trained weights, so that k of the N may differ. With
``schedule="linear"``, :math:`k = N \rho\, (1 - s/S)` shrinks with the step s of S, to N rho / S at the last; with
``"fixed"``, :math:`k = N \rho` . The share rho is ``changed_ratio``.

``schedule="released"`` is what the released code does: it counts the retain batches too, though a pass has a step for
each forget batch only, so that after batch i, from 0, of pass e, of E,

.. math::
    k = N \rho\, \Big(1 - \frac{e\,(F + R) + i + 1}{E\,(F + R)}\Big)

with F and R batches in the two sets: it jumps between passes, and rho R / (E (F + R)) of the weights are left at the
end.

The soft-threshold variant of Fan, Liu, Zhang, Wong, Wei, Liu, "SalUn", ICLR 2024, arXiv 2310.12508. Where this differs
from the released code: tau is the next magnitude after the k that may differ, not the k-th, so k do, but for
magnitudes that tie and changes that round away; N counts the trained weights, not also those of the autoencoder and
the text encoder; weights that do not differ keep their bits, as they are not made by adding zero; tau is found by two
histograms, without a sort, and needs no copy of the changes; and what differs in `salun` (``forget_order``,
``legacy_two_samples``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from sfumato.sharding import is_spread, locals_of, named_parameters, spread_like, whole
from sfumato.trainer import Shard
from sfumato.unlearning.noising import ORDERS
from sfumato.unlearning.saliency import kth_largest
from sfumato.unlearning.salun import SalUnConfig, SalUnObjective
from sfumato.unlearning.task import History, Task, TrainedConfig

__all__ = ["ProximalConfig", "ProximalObjective", "check", "run", "soft_threshold"]


@dataclass
class ProximalConfig(TrainedConfig):
    """Settings of proximal unlearning.

    Attributes:
        retain_weight: alpha, the weight of the retain term.
        changed_ratio: rho, the share of the trained weights that may differ from the original ones.
        schedule: ``"linear"``: the share falls to nothing with the steps; ``"fixed"``: it stays; ``"released"``: it
            falls as in the released code.
        forget_order: As `SalUnConfig` has it.
        legacy_two_samples: Likewise.
    """

    retain_weight: float = 0.5
    changed_ratio: float = 0.5
    schedule: str = field(default="linear", metadata={"choices": ["linear", "fixed", "released"]})
    forget_order: str = field(default="shuffled", metadata={"choices": list(ORDERS)})
    legacy_two_samples: bool = False

    def __post_init__(self) -> None:
        """Check the types and ranges."""
        super().__post_init__()
        if self.retain_weight < 0:
            raise ValueError(f"`retain_weight` must not be negative, got {self.retain_weight}.")
        if self.adapter_rank:
            raise ValueError("The share of weights that differ is not one of adapters: leave out adapter_rank.")
        if not 0 < self.changed_ratio <= 1:
            raise ValueError(f"`changed_ratio` must lie in (0, 1], got {self.changed_ratio}.")

    def share_at(self, step: int, steps: int, forget_batches: int = 1, retain_batches: int = 1) -> float:
        """Give the share of weights that may differ after a step, from 0, of so many.

        Args:
            step: The step.
            steps: How many there are.
            forget_batches: F, of the released schedule alone.
            retain_batches: R, likewise.
        """
        if self.schedule == "fixed":
            return self.changed_ratio
        if self.schedule == "linear":
            return self.changed_ratio * (1 - step / steps)
        both, passes = forget_batches + retain_batches, -(-steps // forget_batches)
        done = step // forget_batches * both + step % forget_batches + 1
        return self.changed_ratio * (1 - done / (passes * both))


class _Distances(Mapping[str, torch.Tensor]):
    """How far each weight is from where it was; made tensor by tensor as it is asked for, so never held whole."""

    def __init__(self, weights: Mapping[str, torch.Tensor], original: Mapping[str, torch.Tensor]) -> None:
        self._weights, self._original = weights, original

    def __getitem__(self, name: str) -> torch.Tensor:
        return (self._weights[name].detach() - self._original[name]).abs()

    def __iter__(self) -> Iterator[str]:
        return iter(self._original)

    def __len__(self) -> int:
        return len(self._original)


@torch.no_grad()
def soft_threshold(
    weights: Mapping[str, torch.Tensor], original: Mapping[str, torch.Tensor], share: float,
    add_up: Callable[[torch.Tensor], Any] | None = None,
) -> float:  # fmt: skip
    """Pull weights towards their original values, in place, until only a share of them differs.

    Args:
        weights: Parameter name to float32 tensor.
        original: Likewise.
        share: The share of all weights that may differ, in [0, 1].
        add_up: Adds a tensor of counts up over the processes, if each has a part of the weights.

    Returns:
        The threshold tau; 0 if no weight need be pulled back.
    """
    total = torch.tensor(sum(values.numel() for values in original.values()))
    if add_up is not None:
        total = add_up(total.to(next(iter(weights.values())).device))
    allowed = int(int(total) * share)
    if allowed >= total:
        return 0.0
    threshold = kth_largest(_Distances(weights, original), allowed + 1, add_up)
    for name, start in original.items():
        change = weights[name] - start
        shrunk = start + change.sign() * (change.abs() - threshold)
        weights[name].copy_(torch.where(change.abs() > threshold, shrunk, start))
    return threshold


class ProximalObjective:
    """SalUn's terms, and the soft threshold after every step; see the module's docstring.

    Args:
        relabelling: SalUn's objective.
        model: The bare module being trained; its weights are remembered as they are now.
        config: Hyper-parameters.
        steps: How many there will be.
        accelerator: The process group.
    """

    def __init__(
        self, relabelling: SalUnObjective, model: torch.nn.Module, config: ProximalConfig, steps: int,
        accelerator: Accelerator,
    ) -> None:  # fmt: skip
        self.relabelling, self.config, self.steps = relabelling, config, steps
        self.model, self.accelerator, self.batch_size = model, accelerator, relabelling.batch_size
        self.original = {name: values.detach().clone() for name, values in self._weights().items()}

    def losses(self, model: torch.nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """Give SalUn's terms ``forget`` and ``retain``."""
        return self.relabelling.losses(model, step, shard)

    def after_step(self, model: torch.nn.Module, step: int, shards: Sequence[Shard]) -> None:
        """Threshold the change; every process has the same weights, or a part of them, and does the same."""
        sets = (self.relabelling.forget, self.relabelling.retain)
        batches = [-(-len(examples) // self.batch_size) for examples in sets]
        weights = self._weights()
        self.original = {name: spread_like(values, weights[name]) for name, values in self.original.items()}
        add_up = partial(self.accelerator.reduce, reduction="sum") if is_spread(self.model) else None
        share = self.config.share_at(step, self.steps, *batches)
        soft_threshold(locals_of(weights), locals_of(self.original), share, add_up)

    def state(self) -> Mapping[str, torch.Tensor]:
        """Give nothing: the weights are the trainer's, and the original ones are there at every start."""
        return {}

    def changed(self) -> float:
        """Give the share of weights that differ from the original ones; once trained, when they are whole again."""
        weights, original = self._weights(), {name: whole(values) for name, values in self.original.items()}
        moved = sum(int((values != weights[name]).sum()) for name, values in original.items())
        return moved / sum(values.numel() for values in original.values())

    def _weights(self) -> dict[str, torch.nn.Parameter]:
        """The trained weights."""
        return {name: values for name, values in named_parameters(self.model).items() if values.requires_grad}


def check(task: Task, config: ProximalConfig) -> None:
    """Refuse, before the long work, an average of the weights: it would differ everywhere."""
    if task.training.ema_decay is not None:
        raise ValueError("`ema_decay` must be None: an average of sparse changes is not sparse.")


def run(task: Task, config: ProximalConfig) -> tuple[History, dict[str, Any]]:
    """Relabel under the threshold; see `sfumato.unlearning.task`."""
    forget, retain = task.examples("forget"), task.examples("retain")
    anchors = task.anchors(forget.prompts)
    prompts = task.prompts(forget.prompts, retain.prompts, list(anchors.values()))
    salun = SalUnConfig(
        batch_size=config.batch_size, retain_weight=config.retain_weight, forget_order=config.forget_order,
        legacy_two_samples=config.legacy_two_samples,
    )  # fmt: skip
    relabelling = SalUnObjective(task.family, task.model, forget, retain, anchors, prompts, salun, task.seed)
    objective = ProximalObjective(relabelling, task.model, config, task.training.steps, task.accelerator)
    history = task.train(objective, "proximal")
    return history, {"changed_share": objective.changed()}
