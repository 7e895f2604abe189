r"""ESD: erase a concept by training its prediction to be the original's, guided away from it.

For states z_t on the way to a picture of the concept c, walked by the original model eps* (see
`sfumato.unlearning.trajectories`), the model is taught

.. math::
    L = \|\epsilon_\theta(z_t, t, c) - T\|^2, \qquad
    T = \epsilon^*(z_t, t, \varnothing) - \eta\,[\epsilon^*(z_t, t, c) - \epsilon^*(z_t, t, \varnothing)] ,

and, to erase c from another prompt f,

.. math::
    L = \|\epsilon_\theta(z_t, t, f) - T\|^2, \qquad
    T = \epsilon^*(z_t, t, f) - \eta_{new}\,[\epsilon^*(z_t, t, c) - \epsilon^*(z_t, t, \varnothing)] .

The second with f = c is the first, with ``eta_new = eta + 1``: the released code had eta = 1 first and has
eta_new = 2 now, which is the same, and for SDXL eta_new = 1, which is eta = 0, the empty prompt's prediction.
``eta_convention`` says which one `eta` means. With either, "a photo of a red sneaker" is guided away from photos and
red things too; ``direction="name"`` takes the second equation for every prompt f of the concept, with the concept's
bare name for c, so that what else the prompt says keeps its meaning.

The variants are choices of ``parameters``: ESD-x is ``"xattn"``, ESD-x strict ``"xattn-kv"``, ESD-u ``"noxattn"``;
``"full"``, ``"selfattn"`` and ``"notime"`` are the others.

Gandikota, Materzynska, Fiotto-Kaufman, Bau, "Erasing Concepts from Diffusion Models", ICCV 2023, arXiv 2303.07345.
Where this differs from the released code: trajectories are shared by all steps, not walked for each; every level of
one is used; a state has the time it was walked to (``legacy_level_mismatch``); the original model walks
(``trajectories="trained"`` lets the model being trained do it, as the first release did); latents have the model's own
size (``legacy_latent_scale``); DDIM walks, whatever the pipeline's scheduler; weights and optimiser are float32, since
half of them, as released, loses small steps; the trained prompts are all wordings of the concept, in shuffled order.
ESD-u trains the projections of the time embedding in the blocks no more than the embedding itself: 787.7 M weights of
Stable Diffusion 1.4; the first release's rule goes by names of another code, in which it trains them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sfumato.families import Family
from sfumato.trainer import Shard
from sfumato.unlearning.examples import PromptTable
from sfumato.unlearning.task import SUBSETS, History, Task
from sfumato.unlearning.trajectories import (
    Bank,
    TrainedTrajectories,
    TrajectoryConfig,
    Walker,
    bank_facts,
    erasing_target,
    find_trajectories,
    shuffled_states,
)

__all__ = ["ESDConfig", "ESDObjective", "run"]

BANK_STREAM, STATE_STREAM, REFRESH_STREAM = 201, 202, 203  # keys that keep the random streams apart


@dataclass
class ESDConfig(TrajectoryConfig):
    """ESD's hyper-parameters; the defaults are those the authors use for Stable Diffusion 1.4, ESD-x.

    Attributes:
        eta: How far to guide away from the concept.
        eta_convention: ``"paper"``: eta as in the first equation of the module; ``"erase_from"``: eta_new, as in the
            second, which is one more.
        erase_from: The prompt f to erase the concept from; None is the concept's own prompts.
        trajectories: Who walks: ``"frozen"``, the original model, or ``"trained"``, the one being trained, every
            `refresh_every` steps.
    """

    batch_size: int = 1
    parameters: str = field(default="xattn", metadata={"choices": SUBSETS})
    eta: float = 1.0
    eta_convention: str = field(default="paper", metadata={"choices": ["paper", "erase_from"]})
    erase_from: str | None = None
    trajectories: str = field(default="frozen", metadata={"choices": ["frozen", "trained"]})

    def __post_init__(self) -> None:
        """Check the types and ranges."""
        super().__post_init__()
        if self.paper_eta < -1:
            raise ValueError(
                f"`eta` must not train towards the concept: it must be at least -1 in the paper's "
                f"convention, got {self.paper_eta:g}."
            )
        if self.direction == "name" and self.erase_from is not None:
            raise ValueError("`direction='name'` erases from the concept's own prompts: leave out `erase_from`.")

    @property
    def paper_eta(self) -> float:
        """The eta of the first equation of the module."""
        return self.eta if self.eta_convention == "paper" else self.eta - 1


class ESDObjective:
    """The erasing term; see the module's docstring.

    Args:
        family: Denoiser call.
        bank: Trajectories of the concept's prompts.
        prompts: Embeddings of all prompts.
        config: Hyper-parameters.
        seed: Seeds the order of the states.
        steps: How many the training has.
    """

    def __init__(
        self, family: Family, bank: Bank, prompts: PromptTable, config: ESDConfig, seed: int, steps: int
    ) -> None:
        self.family, self.bank, self.prompts, self.config = family, bank, prompts, config
        self.batch_size, self.seed, self.steps = config.batch_size, seed, steps

    def losses(self, model: torch.nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """Give the term ``erase``."""
        config = self.config
        base = "prompt" if config.erase_from is None else "source"  # f
        away = "prompt" if config.direction == "prompt" else "source"  # c
        states = self.bank.at(*self._pick(step, shard), ["empty", *dict.fromkeys(("prompt", base, away))])
        target = erasing_target(states.said, base, away, config.paper_eta)
        captions = [prompt if config.erase_from is None else config.erase_from for prompt in states.prompts]
        student = self.family.ask(model, states.latents, states.timesteps, self.prompts(captions))
        return {"erase": F.mse_loss(student, target)}

    def after_step(self, model: torch.nn.Module, step: int, shards: Sequence[Shard]) -> None:
        """Walk anew the trajectories that the next steps will use, if it is the model being trained that walks."""
        every, first = self.config.refresh_every, step + 1
        if isinstance(self.bank, TrainedTrajectories) and first % every == 0 and first < self.steps:
            coming = range(first, min(first + every, self.steps))
            rows = np.concatenate([self._pick(later, Shard(0, 1))[0] for later in coming])
            self.bank.refresh(rows, (self.seed, REFRESH_STREAM, first))

    def state(self) -> Mapping[str, torch.Tensor]:
        """Give the trajectories, if they change."""
        return self.bank.state() if isinstance(self.bank, TrainedTrajectories) else {}

    def _pick(self, step: int, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
        """Rows and levels of a shard's states."""
        span = shard.of(self.batch_size)
        start = step * self.batch_size + span.start
        return shuffled_states(self.bank, self.seed + STATE_STREAM, start, len(span))


def run(task: Task, config: ESDConfig) -> tuple[History, dict[str, Any]]:
    """Walk the trajectories, then erase; see `sfumato.unlearning.task`."""
    concept, source = task.concept, config.names(task.concept)
    if config.erase_from is not None:
        source = dict.fromkeys(concept.prompts, config.erase_from)
    prompts = task.prompts(concept.prompts, ["", *(source or {}).values()])
    walker = Walker(task.family, prompts, config, task.accelerator, source)
    walked = find_trajectories(
        task, walker, concept.prompts * config.trajectories_per_prompt, "trajectories", BANK_STREAM
    )
    bank: Bank = walked if config.trajectories == "frozen" else TrainedTrajectories(walker, task.model, walked)
    objective = ESDObjective(task.family, bank, prompts, config, task.seed, task.training.steps)
    return task.train(objective, "esd"), bank_facts((walker, walked))
