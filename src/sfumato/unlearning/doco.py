r"""DoCo: concept domain correction by a discriminator, and a concept-preserving gradient.

On pictures of the anchor c* with noise added, x_t, and the same captions naming the concept instead, c, the original
model shows what a discriminator D is to call an anchor (0), the model being trained what it is to call the target (1):

.. math::
    r = \hat x_0[\epsilon_{\theta_0}(x_t, c^*)], \quad f = \hat x_0[\epsilon_\theta(x_t, c)], \qquad
    L_D = \mathrm{BCE}(D(f), 1) + \mathrm{BCE}(D(r), 0),

.. math::
    L_G = \mathrm{BCE}(D(f), 0), \qquad L_{pr} = E\, \|\epsilon - \epsilon_\theta(x'_t, c_{x'})\|^2 ,

with :math:`\hat x_0 = (x_t - \sqrt{1-A_t}\,\epsilon)/\sqrt{A_t}` and x' further pictures of the anchor. The step is
taken with the gradient of L_G, out of which what works against that of L_pr is removed (`gradient_surgery`); L_pr is
not otherwise added. Then D takes a step of its own on L_D.

Wu, Zhou, Yang, Wang, Chang, Zhang, Wu, "Unlearning Concepts in Diffusion Model via Concept Domain Correction and
Concept Preserving Gradient", AAAI 2025, arXiv 2405.15304. Where this differs from the released code: the surgery is
the paper's projection (``surgery="official"`` is the code's); D's gradients hold nothing of L_G
(``leak_generator_gradient``); D sees the pictures of the model as updated, not as it was before the step
(``legacy_stale_pictures``); D normalises each latent alone, so that processes can share a batch
(``discriminator_norm="batch"`` is the released one); D is warmed up before the first step, so ``steps`` counts those
of the model; ``max_timestep`` can leave out the times at which :math:`1/\sqrt{A_t}` blows x_0 up; D has as many layers
as the latents' size asks for, and weights drawn from N(0, 0.02), as other patch discriminators have; pictures are not
flipped; predictions of v and of x_0 are converted. Start-of-text keys and values pass no gradient, as in
`concept_ablation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from sfumato.progress import Track
from sfumato.trainer import Shard, checkpoints
from sfumato.trainer.surgery import check_surgery
from sfumato.unlearning.concept_ablation import start_token_without_gradient
from sfumato.unlearning.discriminator import new_adam, patch_discriminator
from sfumato.unlearning.examples import Examples
from sfumato.unlearning.gradient_surgery import SURGERIES, clipped
from sfumato.unlearning.noising import NoisyBatch, noisy_batch
from sfumato.unlearning.original import OriginalModel
from sfumato.unlearning.task import SUBSETS, History, Task, TrainedConfig

__all__ = ["DoCoConfig", "DoCoObjective", "check", "run"]

ANCHOR_STREAM, PRIOR_STREAM, WARMUP_STREAM, WEIGHTS_STREAM = 321, 322, 323, 324


@dataclass
class DoCoConfig(TrainedConfig):
    """DoCo's hyper-parameters; the defaults are those its authors give for an object in Stable Diffusion 1.4.

    Attributes:
        surgery: ``"projection"`` (the paper) or ``"official"`` (its code, which first clips both gradients to a norm
            of 1); see `gradient_surgery`.
        surgery_weight: lambda, how much of the conflict is taken out.
        prior: Pictures of L_pr: ``"anchor"`` (the paper) or ``"retain"``.
        discriminator_learning_rate: Of D's Adam.
        discriminator_warmup: Steps that D takes on the original model before the first of the model.
        discriminator_norm: ``"group"``, or ``"batch"``, which needs the whole batch on one process in one pass.
        leak_generator_gradient: Add the gradient of L_G to D's own, as the released code does by leaving it there.
        legacy_stale_pictures: Show D the pictures that the model made before its step, as released.
        max_timestep: Draw the times that D sees below this; None draws them all.
        train_start_token: Let gradients pass through the start-of-text token's keys and values too.
    """

    parameters: str = field(default="xattn-kv", metadata={"choices": SUBSETS})
    surgery: str = field(default="projection", metadata={"choices": list(SURGERIES)})
    surgery_weight: float = 1.0
    prior: str = field(default="anchor", metadata={"choices": ["anchor", "retain"]})
    discriminator_learning_rate: float = 1e-4
    discriminator_warmup: int = 1000
    discriminator_norm: str = field(default="group", metadata={"choices": ["group", "batch"]})
    leak_generator_gradient: bool = False
    legacy_stale_pictures: bool = False
    max_timestep: int | None = None
    train_start_token: bool = False

    def __post_init__(self) -> None:
        """Check the types and ranges."""
        super().__post_init__()
        if self.surgery_weight < 0:
            raise ValueError(f"`surgery_weight` must not be negative, got {self.surgery_weight}.")
        if self.discriminator_learning_rate <= 0:
            raise ValueError(
                f"`discriminator_learning_rate` must be positive, got {self.discriminator_learning_rate}."
            )
        if self.discriminator_warmup < 0:
            raise ValueError(f"`discriminator_warmup` must not be negative, got {self.discriminator_warmup}.")
        if self.max_timestep is not None and self.max_timestep < 1:
            raise ValueError(f"`max_timestep` must be at least 1, or None for all, got {self.max_timestep}.")


class DoCoObjective:
    """Both terms, the surgery and the discriminator; see the module's docstring.

    Args:
        task: The model at its original weights, which the teacher remembers, and the process group.
        anchor: Pictures of the anchor.
        targets: The concept's prompt for each of them.
        prior: Pictures of L_pr.
        config: Hyper-parameters.
    """

    def __init__(
        self, task: Task, anchor: Examples, targets: Sequence[str], prior: Examples, config: DoCoConfig
    ) -> None:
        self.family, self.accelerator, self.seed = task.family, task.accelerator, task.seed
        self.anchor, self.targets, self.prior, self.config = anchor, list(targets), prior, config
        self.batch_size = config.batch_size
        self.prompts = task.prompts(self.targets, anchor.prompts, prior.prompts)
        self.teacher = OriginalModel(task.model)
        shape = (anchor.mean.shape[1], anchor.mean.shape[2], anchor.mean.shape[3])
        self.discriminator = patch_discriminator(shape, config.discriminator_norm, (self.seed, WEIGHTS_STREAM))
        self.discriminator.to(task.family.device)
        self._stale: dict[tuple[int, Shard], torch.Tensor] = {}  # what a step made before it moved the weights
        self.adam, self._moments = new_adam(self.discriminator, config.discriminator_learning_rate)

    def losses(self, model: torch.nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """Give ``generator`` and ``prior``; both share one forward pass."""
        batch, captions = self._pictures(step, shard, ANCHOR_STREAM)
        kept = noisy_batch(
            self.family, self.prior, self.batch_size, step, shard, seed=self.seed, stream=PRIOR_STREAM
        )  # fmt: skip
        predicted = self.family.ask(
            model, torch.cat([batch.noisy, kept.noisy]), torch.cat([batch.timesteps, kept.timesteps]),
            self.prompts([*captions, *kept.captions]),
        )  # fmt: skip
        shown, remembered = predicted.chunk(2)
        fake, _ = self.family.split(shown, batch.noisy, batch.timesteps)
        if self.config.legacy_stale_pictures:
            self._stale[step, shard] = fake.detach()
        return {"generator": self._called(fake, 0.0), "prior": F.mse_loss(remembered, kept.target)}

    def combine(self, gradients: Mapping[str, list[torch.Tensor]]) -> list[torch.Tensor]:
        """Take out of the generator's gradient what works against the prior's."""
        both = [gradients["generator"], gradients["prior"]]
        if self.config.surgery == "official":
            both = [clipped(one) for one in both]
        return SURGERIES[self.config.surgery](both[0], both[1], self.config.surgery_weight)

    def after_step(self, model: torch.nn.Module, step: int, shards: Sequence[Shard]) -> None:
        """Let the discriminator take a step on the pictures of this one."""
        self._train_discriminator(model, step, shards, ANCHOR_STREAM, leak=self.config.leak_generator_gradient)
        self._stale.clear()

    def state(self) -> Mapping[str, torch.Tensor]:
        """Give the discriminator's weights and moments."""
        return {**self.discriminator.state_dict(keep_vars=True), **self._moments}

    def warm_up(self, shard: Shard) -> None:
        """Let the discriminator learn on the original model; `shard` is this process's share of each batch."""
        steps = range(self.config.discriminator_warmup)
        for step in Track(steps, "discriminator", shown=self.accelerator.is_main_process):
            self._train_discriminator(self.teacher, step, [shard], WARMUP_STREAM, leak=False)

    def _train_discriminator(
        self, model: torch.nn.Module, step: int, shards: Sequence[Shard], stream: int, leak: bool
    ) -> None:
        parameters = list(self.discriminator.parameters())
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for shard in shards:
            fake, real = self._clean(model, step, shard, stream)
            loss = self._called(fake, 1.0) + self._called(real, 0.0)
            if leak:
                loss = loss + self._called(fake, 0.0)
            torch._foreach_add_(sums, list(torch.autograd.grad(loss / len(shards), parameters)))
        for parameter, gradient in zip(parameters, sums, strict=True):
            parameter.grad = self.accelerator.reduce(gradient, "mean")
        self.adam.step()
        self.adam.zero_grad()

    @torch.no_grad()
    def _clean(
        self, model: torch.nn.Module, step: int, shard: Shard, stream: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model makes of the concept's prompts and the original of the anchor's, ``(B, C, H, W)`` each."""
        batch, captions = self._pictures(step, shard, stream)
        stale = self._stale.get((step, shard)) if stream == ANCHOR_STREAM else None
        made = [] if stale is None else [stale]
        for network, prompts in ((model, captions), (self.teacher, batch.captions))[len(made) :]:
            with self.accelerator.autocast():
                predicted = self.family.ask(network, batch.noisy, batch.timesteps, self.prompts(prompts))
            made.append(self.family.split(predicted, batch.noisy, batch.timesteps)[0])
        return made[0], made[1]

    def _pictures(self, step: int, shard: Shard, stream: int) -> tuple[NoisyBatch, list[str]]:
        """This shard's anchor pictures, noisy, and the concept's prompt for each."""
        batch = noisy_batch(
            self.family, self.anchor, self.batch_size, step, shard, seed=self.seed, stream=stream,
            max_timestep=self.config.max_timestep,
        )  # fmt: skip
        return batch, [self.targets[row] for row in batch.rows]

    def _called(self, latents: torch.Tensor, label: float) -> torch.Tensor:
        """Binary cross-entropy between what D calls latents and a label: 0 is the anchor, 1 the target."""
        with torch.autocast(latents.device.type, enabled=False):  # D is small, and float32 keeps it sound
            logits = self.discriminator(latents)
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def check(task: Task, config: DoCoConfig) -> None:
    """Check, before the long work, what depends on the model and the processes."""
    passes = task.training.gradient_accumulation_steps
    if config.discriminator_norm == "batch" and task.accelerator.num_processes * passes > 1:
        raise ValueError(
            "discriminator_norm='batch' needs the whole batch at once: run one process with "
            "gradient_accumulation_steps=1, or choose 'group'."
        )
    check_surgery(task.training, task.accelerator)
    if config.max_timestep is not None and config.max_timestep > task.family.num_train_timesteps:
        raise ValueError(
            f"`max_timestep` must be at most {task.family.num_train_timesteps}, got {config.max_timestep}."
        )
    patch_discriminator(
        task.family.latent_shape, config.discriminator_norm, (0,)
    )  # refuses latents that are too small


def run(task: Task, config: DoCoConfig) -> tuple[History, dict[str, Any]]:
    """Warm the discriminator up, then train; see `sfumato.unlearning.task`."""
    anchor, concept = task.examples("anchor"), task.concept
    targets = [concept.prompts[k % len(concept.prompts)] for k in range(len(anchor))]
    prior = anchor if config.prior == "anchor" else task.examples("retain")
    objective = DoCoObjective(task, anchor, targets, prior, config)
    # a checkpoint holds a discriminator that has been warmed up
    if not (task.resume and task.output_dir and checkpoints.newest(task.output_dir)):
        objective.warm_up(Shard(task.accelerator.process_index, task.accelerator.num_processes))
    if config.train_start_token:
        return task.train(objective, "doco"), {}
    with start_token_without_gradient(task.family, task.model):
        return task.train(objective, "doco"), {}
