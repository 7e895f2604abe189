r"""Gradient ascent: the model unlearns how to denoise the concept's pictures.

.. math::
    L = -E_{x \in D_f} \min(\ell_x, B) + \alpha\, E_{x \in D_r} \ell_x , \qquad
    \ell_x = \|\epsilon - \epsilon_\theta(x_t, c_x)\|^2 , \qquad
    B = b\, E_{x \in D_f} \ell_x(\theta_0) ,

alpha being ``retain_weight`` and b ``bound``: a picture whose loss has grown beyond b times what the forget set's was
at the start pulls no further. Without the bound the loss has no minimum, and the whole model is lost.

The baseline of Fan et al., "SalUn", ICLR 2024, arXiv 2310.12508, as their release runs it on Stable Diffusion. The
bound is ours; ``bound: null`` switches it off. Both sets are shuffled at every pass, where until February 2026 the
released code showed the first forget batch in every step (``forget_order``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from sfumato.families import Family
from sfumato.trainer import Shard
from sfumato.unlearning.examples import Examples, PromptTable
from sfumato.unlearning.noising import ORDERS, noisy_batch
from sfumato.unlearning.task import History, Task, TrainedConfig

__all__ = ["GradientAscentConfig", "GradientAscentObjective", "run", "starting_loss"]

FORGET_STREAM, RETAIN_STREAM, START_STREAM = 311, 312, 313


@dataclass
class GradientAscentConfig(TrainedConfig):
    """Settings of gradient ascent.

    Attributes:
        retain_weight: alpha, the weight of the retain term.
        forget_order: ``"shuffled"`` anew in every pass, ``"sequential"``, or always the ``"first"`` batch.
        bound: b, how many times the starting loss of the forget set a picture's loss may grow; None sets no bound.
    """

    retain_weight: float = 0.1
    forget_order: str = field(default="shuffled", metadata={"choices": list(ORDERS)})
    bound: float | None = 5.0

    def __post_init__(self) -> None:
        """Check the types and ranges."""
        super().__post_init__()
        if self.retain_weight < 0:
            raise ValueError(f"`retain_weight` must not be negative, got {self.retain_weight}.")
        if self.bound is not None and self.bound <= 1:
            raise ValueError(f"`bound` must be above 1, where the loss starts, or None, got {self.bound}.")


class GradientAscentObjective:
    """The ascent and retain terms; see the module's docstring.

    Args:
        family: Noise schedule, prediction type and denoiser call.
        forget: Examples of the concept.
        retain: Examples to keep.
        prompts: Embeddings of their captions.
        config: Hyper-parameters.
        seed: Seeds order, noise and times.
        ceiling: B, beyond which a picture's loss is not driven; infinite for no bound.
    """

    def __init__(
        self, family: Family, forget: Examples, retain: Examples, prompts: PromptTable,
        config: GradientAscentConfig, seed: int, ceiling: float = float("inf"),
    ) -> None:  # fmt: skip
        self.family, self.forget, self.retain, self.prompts = family, forget, retain, prompts
        self.batch_size, self.retain_weight = config.batch_size, config.retain_weight
        self.forget_order = config.forget_order
        self.seed, self.ceiling = seed, ceiling

    def losses(self, model: torch.nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """Give the terms ``forget`` (negative) and ``retain``; both share one forward pass."""
        sets = ((self.forget, FORGET_STREAM, self.forget_order), (self.retain, RETAIN_STREAM, "shuffled"))
        drawn = [
            noisy_batch(
                self.family, examples, self.batch_size, step, shard, seed=self.seed, stream=stream, order=order
            )
            for examples, stream, order in sets
        ]
        predicted = self.family.ask(
            model, torch.cat([batch.noisy for batch in drawn]), torch.cat([batch.timesteps for batch in drawn]),
            self.prompts([caption for batch in drawn for caption in batch.captions]),
        )  # fmt: skip
        forgotten, kept = predicted.chunk(2)
        per_picture = (forgotten - drawn[0].target).pow(2).flatten(1).mean(1)
        return {
            "forget": -per_picture.clamp(max=self.ceiling).mean(),
            "retain": self.retain_weight * F.mse_loss(kept, drawn[1].target),
        }


@torch.no_grad()
def starting_loss(task: Task, forget: Examples, prompts: PromptTable, batch_size: int) -> float:
    """Give the mean denoising loss of one pass over the forget set at the original weights; processes share it."""
    accelerator, batches = task.accelerator, -(-len(forget) // batch_size)
    total = torch.zeros((), device=task.family.device)
    for number in range(accelerator.process_index, batches, accelerator.num_processes):
        batch = noisy_batch(
            task.family, forget, batch_size, number, Shard(0, 1), seed=task.seed, stream=START_STREAM
        )  # fmt: skip
        with accelerator.autocast():
            predicted = task.family.ask(task.model, batch.noisy, batch.timesteps, prompts(batch.captions))
        total += F.mse_loss(predicted, batch.target)
    return float(accelerator.reduce(total, "sum")) / batches


def run(task: Task, config: GradientAscentConfig) -> tuple[History, dict[str, Any]]:
    """Ascend; see `sfumato.unlearning.task`."""
    forget, retain = task.examples("forget"), task.examples("retain")
    prompts = task.prompts(forget.prompts, retain.prompts)
    ceiling, facts = float("inf"), {}
    if config.bound is not None:
        start = starting_loss(task, forget, prompts, config.batch_size)
        ceiling, facts = config.bound * start, {"starting_forget_loss": start}
    objective = GradientAscentObjective(task.family, forget, retain, prompts, config, task.seed, ceiling)
    return task.train(objective, "gradient ascent"), facts
