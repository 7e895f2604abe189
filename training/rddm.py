"""Train a restoration or generation model with RDDM (Liu et al., CVPR 2024, arXiv 2308.13712), on one process or many.

accelerate launch training/rddm.py --data FOLDER --task sr --scale 4 --output out/
accelerate launch --num_processes 8 -m sfumato.training.rddm --generation True --output out/

Residual R = y - x0 (y the degraded picture, 0 for generation) and noise are added at once, t uniform over T times:

    x_t  = x0 + A_t R + B_t noise
    loss = sum over heads of mean |target - head(x_t, t, y)|          restoration (L1)
                          or mean (target - head(x_t, t))^2           generation (L2)

The heads' targets are R and noise, or one of them, or x0, as `prediction_type` says. With `two_networks`, each head is
a network of its own, told A_t T or B_t T, and both are trained by one optimiser. ``--help`` lists every setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sfumato.pipelines.pipeline_rddm import RDDMPipeline
from sfumato.restoration.examples import Examples, predict
from sfumato.restoration.job import Method, main
from sfumato.restoration.networks import NetworkConfig
from sfumato.schedulers.residual_schedule import TWO_HEADS
from sfumato.schedulers.scheduling_rddm import RDDMScheduler
from sfumato.settings import check_types
from sfumato.trainer import Shard


class RDDMObjective:
    """Sum of the heads' mean errors, at random times.

    Args:
        examples: What to learn from.
        scheduler: The two schedules.
        patch_size: Blocks that are folded into channels for the network.
        loss: ``"l1"`` or ``"l2"``.
        two_networks: Whether the heads are networks of their own, told levels in the place of the time.
    """

    def __init__(
        self, examples: Examples, scheduler: RDDMScheduler, patch_size: int, loss: str, two_networks: bool
    ) -> None:
        self.examples, self.scheduler, self.patch_size = examples, scheduler, patch_size
        self.error, self.two_networks = {"l1": F.l1_loss, "l2": F.mse_loss}[loss], two_networks
        self.batch_size = examples.batch_size

    def losses(self, model: nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """See `sfumato.trainer.Objective`."""
        batch = self.examples.draw(model, step, shard)
        noise, times = batch.noise(), batch.times(self.scheduler.config.num_train_timesteps)
        pair = batch.clean, noise, times, batch.degraded
        told: Any = times
        if self.two_networks:
            told = tuple(level.float() for level in self.scheduler.network_times(times))
        output = predict(model, self.scheduler.add_noise(*pair), batch.condition, told, self.patch_size)
        heads, targets = self.scheduler.split_heads(output, batch.clean), self.scheduler.training_target(*pair)
        errors = (self.error(head, target) for head, target in zip(heads, targets, strict=True))
        return {f"head {number}": error for number, error in enumerate(errors, start=1)}


@dataclass
class RDDMConfig:
    """The two schedules, and what is learned; see `RDDMScheduler`.

    Attributes:
        num_train_timesteps: T, of the schedules; how many steps to sample in is chosen when sampling.
        alpha_schedule: Weights of the residual: ``"decreased"``, ``"increased"``, ``"average"`` or ``"normal"``.
        beta_schedule: Weights of the noise's variance, likewise.
        sum_scale: S, variance of the noise at the last time; None is 0.01 for restoration, 1 for generation.
        prediction_type: What the heads put out: ``"pred_res_noise"``, ``"pred_x0_noise"``, ``"pred_res_add_noise"``,
            ``"pred_x0_add_noise"``, ``"pred_res"`` or ``"pred_noise"``. None is the first for generation and for two
            networks, otherwise ``"pred_res"``: with as little noise as restoration has, a head for it learns slowly
            and takes the other's share of the gradient.
        clip_sample_range: Clip predicted residuals, and the clean pictures that follow, to plus and minus this; not in
            latents. None is 1 for generation, as the released programs have it always, and 2 for restoration: the
            residual of a hole, where white may have become black, is 2, though the scheduler then lets clean pictures,
            which are in [-1, 1], go so far too.
        loss: ``"l1"`` or ``"l2"``; None is L1 for restoration, L2 for generation.
        two_networks: Take a network for each head.
        conditioned: Tell the network the degraded picture; generation has none.
        generation: Draw new pictures: nothing is degraded.
    """

    num_train_timesteps: int = 1000
    alpha_schedule: str = "decreased"
    beta_schedule: str = "increased"
    sum_scale: float | None = None
    prediction_type: str | None = None
    clip_sample_range: float | None = None
    loss: str | None = None
    two_networks: bool = False
    conditioned: bool = True
    generation: bool = False

    def __post_init__(self) -> None:
        """Check the settings, and put the task's own in the place of None; the scheduler knows what they may be."""
        check_types(self)
        if self.sum_scale is None:
            self.sum_scale = 1.0 if self.generation else 0.01
        if self.clip_sample_range is None:
            self.clip_sample_range = 1.0 if self.generation else 2.0
        if self.prediction_type is None:
            self.prediction_type = "pred_res_noise" if self.generation or self.two_networks else "pred_res"
        if self.loss is None:
            self.loss = "l2" if self.generation else "l1"
        if self.loss not in ("l1", "l2"):
            raise ValueError(f"`loss` must be l1 or l2, got {self.loss!r}.")
        if self.two_networks and self.prediction_type not in TWO_HEADS:
            raise ValueError(f"`two_networks` needs a prediction of two heads, got {self.prediction_type!r}.")
        self.conditioned = self.conditioned and not self.generation
        self.scheduler(latent=False)

    def scheduler(self, latent: bool) -> RDDMScheduler:
        """Make the schedules, for latents or for pixels."""
        own = (
            "num_train_timesteps", "alpha_schedule", "beta_schedule", "sum_scale", "prediction_type",
            "clip_sample_range",
        )  # fmt: skip
        return RDDMScheduler(**{name: getattr(self, name) for name in own}, clip_sample=not latent)


TRAINING = {
    "steps": 20000, "learning_rate": 5e-4, "optimizer": "adamw", "lr_schedule": "cosine", "warmup_steps": 200,
    "max_grad_norm": 1.0, "ema_decay": 0.995, "checkpoint_every": 1000,
}  # fmt: skip
"""How to train, in the place of the defaults of `TrainingConfig`: for networks of a few million weights."""


def make(config: RDDMConfig, network: NetworkConfig) -> Method:
    """Give what `sfumato.restoration.job` needs to train it."""
    scheduler, loss = config.scheduler(latent=network.vae is not None), config.loss or "l1"

    def objective(examples: Examples) -> RDDMObjective:
        return RDDMObjective(examples, scheduler, network.patch_size, loss, config.two_networks)

    def assemble(model: Any, vae: Any, settings: Mapping[str, Any]) -> RDDMPipeline:
        if config.two_networks:
            return RDDMPipeline(model.unet, scheduler, vae, model.noise_unet, **settings)
        return RDDMPipeline(model, scheduler, vae, **settings)

    heads = 1 + (config.prediction_type in TWO_HEADS)
    return Method(
        "rddm", "RDDM (arXiv 2308.13712)", config, objective, assemble, heads=heads,
        two_networks=config.two_networks, conditioned=config.conditioned, generation=config.generation,
    )  # fmt: skip


if __name__ == "__main__":
    main(RDDMConfig, TRAINING, make, __doc__.splitlines()[0])
