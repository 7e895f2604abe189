"""Train a restoration model with ResShift (Yue et al., arXiv 2307.12348 and 2403.07319), on one process or many.

accelerate launch training/resshift.py --data FOLDER --task sr --scale 4 --output out/
accelerate launch --num_processes 8 -m sfumato.training.resshift --task inpaint --output out/

The chain shifts the residual between the clean picture x0 and the degraded one y, k = `kappa`, t uniform over T times:

    x_t  = x0 + eta_t (y - x0) + k sqrt(eta_t) noise
    loss = mean of w_t (target - network(scaled x_t, t, y))^2

The target is x0 itself unless `prediction_type` says otherwise; w_t is 1 unless `weighted`. (The released program of
the second paper adds LPIPS of the decoded prediction, which is left out here.) ``--help`` lists every setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sfumato.pipelines.pipeline_resshift import ResShiftPipeline
from sfumato.restoration.examples import Examples, predict
from sfumato.restoration.job import Method, main
from sfumato.restoration.networks import NetworkConfig
from sfumato.schedulers.scheduling_resshift import ResShiftScheduler
from sfumato.settings import check_types
from sfumato.trainer import Shard


class ResShiftObjective:
    """Weighted squared error of what the network is to predict, at random times of the chain.

    Args:
        examples: What to learn from.
        scheduler: The chain.
        patch_size: Blocks that are folded into channels for the network.
        weighted: Weigh by the variational bound.
    """

    def __init__(self, examples: Examples, scheduler: ResShiftScheduler, patch_size: int, weighted: bool) -> None:
        self.examples, self.scheduler, self.patch_size, self.weighted = examples, scheduler, patch_size, weighted
        self.batch_size = examples.batch_size

    def losses(self, model: nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """See `sfumato.trainer.Objective`."""
        batch = self.examples.draw(model, step, shard)
        assert batch.degraded is not None  # there is no generation by this chain
        noise, times = batch.noise(), batch.times(self.scheduler.config.num_train_timesteps)
        pair = batch.clean, noise, times, batch.degraded
        state = self.scheduler.scale_model_input(self.scheduler.add_noise(*pair), times)
        output = predict(model, state, batch.condition, times, self.patch_size)
        errors = (self.scheduler.training_target(*pair) - output).square().flatten(1).mean(1)  # (B,)
        return {"mse": (self.scheduler.loss_weights(times, self.weighted).to(errors) * errors).mean()}


@dataclass
class ResShiftConfig:
    """The chain; see `ResShiftScheduler`.

    Attributes:
        num_train_timesteps: T, steps of the chain, in training as in sampling: 4, or 15.
        min_noise_level: Noise at the first time; None is the published value: 0.2 for fewer than 15 steps, else 0.04.
        kappa: Strength of the noise.
        power: How late the shift sets in.
        etas_end: The last sqrt(eta).
        prediction_type: What the network puts out: ``"sample"`` (x0), ``"residual"``, ``"epsilon"`` or
            ``"epsilon_scale"``.
        weighted: Weigh the times by the variational bound; the released settings do not.
    """

    num_train_timesteps: int = 4
    min_noise_level: float | None = None
    kappa: float = 2.0
    power: float = 0.3
    etas_end: float = 0.99
    prediction_type: str = "sample"
    weighted: bool = False

    def __post_init__(self) -> None:
        """Check the settings; the scheduler knows what they may be."""
        check_types(self)
        if self.min_noise_level is None:
            self.min_noise_level = 0.04 if self.num_train_timesteps >= 15 else 0.2
        self.scheduler(latent=False)

    def scheduler(self, latent: bool) -> ResShiftScheduler:
        """Make the chain, in latents or in pixels."""
        chain = {name: value for name, value in vars(self).items() if name != "weighted"}
        return ResShiftScheduler(**chain, latent_space=latent, clip_sample=not latent)


TRAINING = {
    "steps": 20000, "learning_rate": 5e-4, "optimizer": "adamw", "lr_schedule": "cosine", "warmup_steps": 200,
    "max_grad_norm": 1.0, "ema_decay": 0.999, "checkpoint_every": 1000,
}  # fmt: skip
"""How to train, in the place of the defaults of `TrainingConfig`: for networks of a few million weights."""


def make(config: ResShiftConfig, network: NetworkConfig) -> Method:
    """Give what `sfumato.restoration.job` needs to train it."""
    scheduler = config.scheduler(latent=network.vae is not None)

    def objective(examples: Examples) -> ResShiftObjective:
        return ResShiftObjective(examples, scheduler, network.patch_size, config.weighted)

    def assemble(unet: Any, vae: Any, settings: Mapping[str, Any]) -> ResShiftPipeline:
        return ResShiftPipeline(unet, scheduler, vae, **settings)

    return Method("resshift", "ResShift (arXiv 2307.12348)", config, objective, assemble)


if __name__ == "__main__":
    main(ResShiftConfig, TRAINING, make, __doc__.splitlines()[0])
