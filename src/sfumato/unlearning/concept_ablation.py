r"""Concept Ablation: the concept's prompt learns to mean its anchor.

On pictures x of the anchor c* ("a bag"), whose captions are turned into the concept's ("a sneaker"), c:

.. math::
    L_{model} = E\, \|\epsilon_\theta(x_t, c) - \mathrm{sg}[\epsilon_\theta(x_t, c^*)]\|^2 , \qquad
    L_{noise} = E\, \|\epsilon - \epsilon_\theta(x_t, c)\|^2 ,

and with prior preservation :math:`+ \beta\, E\, \|\epsilon - \epsilon_\theta(x'_t, c^*)\|^2` on other draws x' of the
anchor pictures under their own captions. ``sg[.]`` is the model being trained, detached (``frozen_teacher`` takes the
original instead); beta is ``prior_weight``. Keys and values of the start-of-text token pass no gradient on: they are
the same in every prompt, and moving weights through them would change every prompt.

Kumari, Zhang, Wang, Shechtman, Zhang, Zhu, "Ablating Concepts in Text-to-Image Diffusion Models", ICCV 2023, arXiv
2303.13516. Where this differs from the released code: pictures are neither flipped nor scaled at random (so there is
no mask of the valid area); anchor pictures come from the anchors of the concept's own prompts, not from prompts that a
language model wrote; the prior may be the retain set (``prior="retain"``), which the paper has not; the learning rate
is the one that is used, whereas ``--scale_lr`` multiplies the released one by batch, accumulation and processes, and
by two with a prior. Training an embedding of the text encoder alone is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from sfumato.families import Family, StableDiffusion
from sfumato.trainer import Shard
from sfumato.unlearning.examples import Examples, PromptTable
from sfumato.unlearning.noising import noisy_batch
from sfumato.unlearning.original import OriginalModel
from sfumato.unlearning.task import SUBSETS, History, Task, TrainedConfig

__all__ = ["ConceptAblationConfig", "ConceptAblationObjective", "run", "start_token_without_gradient"]

ANCHOR_STREAM, PRIOR_STREAM = 301, 302


@dataclass
class ConceptAblationConfig(TrainedConfig):
    """Concept Ablation's hyper-parameters; the defaults are those of its authors for a style or an object.

    Attributes:
        objective: ``"model"`` or ``"noise"``; see the module's docstring.
        frozen_teacher: Take the original model for ``sg[.]``; else the one being trained. ``"model"`` only.
        prior: Pictures whose meaning a further term preserves: ``"none"``, ``"anchor"`` or ``"retain"``.
        prior_weight: beta, the weight of that term.
        train_start_token: Let gradients pass through the start-of-text token's keys and values too.
    """

    parameters: str = field(default="xattn-kv", metadata={"choices": SUBSETS})
    objective: str = field(default="model", metadata={"choices": ["model", "noise"]})
    frozen_teacher: bool = False
    prior: str = field(default="none", metadata={"choices": ["none", "anchor", "retain"]})
    prior_weight: float = 1.0
    train_start_token: bool = False

    def __post_init__(self) -> None:
        """Check the types and ranges."""
        super().__post_init__()
        if self.prior_weight < 0:
            raise ValueError(f"`prior_weight` must not be negative, got {self.prior_weight}.")
        if self.frozen_teacher and self.objective == "noise":
            raise ValueError("`frozen_teacher` needs objective='model': the noise-based objective has no teacher.")


class ConceptAblationObjective:
    """The ablation term and that of the prior; see the module's docstring.

    Args:
        family: Noise schedule, prediction type and denoiser call.
        teacher: Gives ``sg[.]``: the bare module being trained, or an `OriginalModel`.
        anchor: Pictures of the anchor.
        targets: The concept's prompt for each of them.
        prior: Pictures to preserve; None for no such term.
        prompts: Embeddings of all their captions.
        config: Hyper-parameters.
        seed: Seeds order, noise and times.
    """

    def __init__(
        self, family: Family, teacher: torch.nn.Module, anchor: Examples, targets: list[str],
        prior: Examples | None, prompts: PromptTable, config: ConceptAblationConfig, seed: int,
    ) -> None:  # fmt: skip
        self.family, self.teacher, self.prompts = family, teacher, prompts
        self.anchor, self.targets, self.prior = anchor, targets, prior
        self.config, self.seed, self.batch_size = config, seed, config.batch_size

    def losses(self, model: torch.nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """Give ``ablation`` and, with a prior, ``prior``; both share one forward pass."""
        family, seed, size = self.family, self.seed, self.batch_size
        batch = noisy_batch(family, self.anchor, size, step, shard, seed=seed, stream=ANCHOR_STREAM)
        noisy, timesteps, captions = batch.noisy, batch.timesteps, [self.targets[row] for row in batch.rows]
        if self.prior is not None:
            kept = noisy_batch(family, self.prior, size, step, shard, seed=seed, stream=PRIOR_STREAM)
            noisy, timesteps = torch.cat([noisy, kept.noisy]), torch.cat([timesteps, kept.timesteps])
            captions += kept.captions
        predicted = family.ask(model, noisy, timesteps, self.prompts(captions))
        target = batch.target
        if self.config.objective == "model":
            with torch.no_grad():
                anchored = self.prompts(batch.captions)
                target = family.ask(self.teacher, batch.noisy, batch.timesteps, anchored)
        terms = {"ablation": F.mse_loss(predicted[: len(target)], target)}
        if self.prior is not None:
            terms["prior"] = self.config.prior_weight * F.mse_loss(predicted[len(target) :], kept.target)
        return terms


@contextmanager
def start_token_without_gradient(family: Family, model: torch.nn.Module) -> Iterator[None]:
    """Detach the first token's keys and values in every cross-attention of a model, for as long as the context lasts.

    What is detached is the *output* of the key and value projections, k_0 = W h_0 and v_0. To detach their input h_0
    would not do: W would still receive dL/dk_0 h_0^T. No value changes, only the gradient, and this for W as for
    whatever made h_0. k_0 still moves with W, as the other tokens move W. Models whose text has no start token
    (all but Stable Diffusion 1, 2 and XL) are left alone.

    Args:
        family: Knows the projections.
        model: Its denoiser, or a copy.
    """
    names = set()
    if isinstance(family, StableDiffusion):
        names = {name.rpartition(".")[0] for name in family.trainable_parameters("xattn-kv")}

    def detach_first(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)  # (B, tokens, width)

    # hooks, and around the whole training: gradient checkpointing calls the projections again in the backward pass
    hooks = [model.get_submodule(name).register_forward_hook(detach_first) for name in sorted(names)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def run(task: Task, config: ConceptAblationConfig) -> tuple[History, dict[str, Any]]:
    """Ablate; see `sfumato.unlearning.task`."""
    anchor, concept = task.examples("anchor"), task.concept
    targets = [concept.prompts[k % len(concept.prompts)] for k in range(len(anchor))]
    prior = None if config.prior == "none" else task.examples(config.prior)
    prompts = task.prompts(targets, anchor.prompts, prior.prompts if prior else ())
    teacher = OriginalModel(task.model) if config.frozen_teacher else task.model
    objective = ConceptAblationObjective(task.family, teacher, anchor, targets, prior, prompts, config, task.seed)
    if config.train_start_token:
        return task.train(objective, "concept ablation"), {}
    with start_token_without_gradient(task.family, task.model):
        return task.train(objective, "concept ablation"), {}
