"""Train the extra step of One More Step (Hu et al., CVPR 2024, arXiv 2311.15744) for a Stable Diffusion model.

accelerate launch training/one_more_step.py --model MODEL --data FOLDER --output out/
accelerate launch --num_processes 8 -m sfumato.training.one_more_step --model MODEL --data FOLDER --output out/

A network without a time learns the velocity at the time at which no signal is left, from noise n that has nothing of
the picture x0, and the caption c:

    loss = mean of (v(n, c) + x0)^2

so that -v becomes the mean of the pictures of a caption, in the model's latents. The authors have published no
training: this is what a velocity is where A = 0, and all settings are ours. Captions are encoded as
`OneMoreStepPipeline` encodes prompts, and dropped one time in ten, so that the step can be guided. The result is what
``OneMoreStepPipeline.from_pretrained("out/", base=pipe)`` loads. ``--help`` lists every setting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from sfumato.families import Family, StableDiffusion
from sfumato.guidance.card import ONE_MORE_STEP
from sfumato.guidance.job import Materials, main
from sfumato.guidance.networks import NetworkConfig, make_timeless_unet
from sfumato.guidance.pictures import Captioned, Renders
from sfumato.pipelines.pipeline_one_more_step import NO_SIGNAL, OneMoreStepPipeline, encoders_of, text_states
from sfumato.randomness import rng_for
from sfumato.settings import check_types
from sfumato.trainer import Shard
from sfumato.unlearning.examples import Examples
from sfumato.unlearning.noising import NoisyBatch, noisy_batch

TRAINED, MEASURED = 821, 822  # keys that keep the random streams apart
DROPPED = 4  # stream of a sample
SAMPLES = 512  # that the result is measured on

Encode = Callable[[list[str]], torch.Tensor]


class OneMoreStepObjective:
    """Squared error of the velocity at the time without a signal.

    Args:
        family: The model's.
        examples: What to learn from.
        encode: Gives what the network is told of prompts, ``(B, tokens, width)``.
        batch_size: Pictures of a step.
        seed: Seeds everything.
        dropped: The share of captions that is left out.
    """

    def __init__(
        self, family: Family, examples: Examples, encode: Encode, batch_size: int, seed: int, dropped: float
    ) -> None:  # fmt: skip
        self.family, self.examples, self.encode = family, examples, encode
        self.batch_size, self.seed, self.dropped = batch_size, seed, dropped

    def losses(self, model: nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """See `sfumato.trainer.Objective`."""
        batch = noisy_batch(
            self.family, self.examples, self.batch_size, step, shard, seed=self.seed, stream=TRAINED
        )  # fmt: skip
        captions = self.captions(batch)
        with torch.autocast(batch.noise.device.type, enabled=False):  # mixed precision is the network's
            told = self.encode(captions)
        velocity = model(batch.noise, torch.zeros_like(batch.timesteps), told).sample
        return {"mse": (velocity.float() + batch.clean).square().mean()}

    def captions(self, batch: NoisyBatch) -> list[str]:
        """Give the captions of a batch, of which some are dropped."""
        draws = [rng_for(*key, DROPPED).random() for key in batch.keys]
        return ["" if draw < self.dropped else text for draw, text in zip(draws, batch.captions, strict=True)]


@dataclass
class OneMoreStepConfig:
    """What is particular to the step.

    Attributes:
        caption_dropout: The share of captions that is left out, for guidance; None is one in ten, and of the renders
            of atelier 0: one in ten of their captions is empty already.
    """

    caption_dropout: float | None = None

    def __post_init__(self) -> None:
        """Check the share."""
        check_types(self)
        if self.caption_dropout is not None and not 0 <= self.caption_dropout < 1:
            raise ValueError(f"`caption_dropout` must lie in [0, 1), got {self.caption_dropout}.")


TRAINING = {
    "steps": 10000, "learning_rate": 1e-4, "optimizer": "adamw", "lr_schedule": "cosine", "warmup_steps": 200,
    "max_grad_norm": 1.0, "ema_decay": 0.999, "checkpoint_every": 1000,
}  # fmt: skip
"""How to train, in the place of the defaults of `TrainingConfig`; the authors have published nothing of it."""


class OneMoreStep:
    """The method, for `sfumato.guidance.job`.

    Args:
        settings: Its config.
    """

    name = ONE_MORE_STEP

    def __init__(self, settings: OneMoreStepConfig) -> None:
        self.settings = settings

    def check(self, family: Family, pictures: Captioned) -> None:
        """Refuse a model that starts from pure noise already, or that the pipeline does not draw with."""
        if not isinstance(family, StableDiffusion):
            reason = "is a flow, which starts from pure noise as it should" if family.flow else "is none of these"
            raise ValueError(f"One More Step is for Stable Diffusion 1, 2 and XL, and {family.label} {reason}.")
        signal, _ = family.process.scales(torch.tensor([family.num_train_timesteps - 1]))
        if float(signal) ** 2 < NO_SIGNAL:
            raise ValueError(
                "The model's schedule ends without any signal (zero terminal SNR), so that sampling starts from pure"
                " noise as it should: one more step has nothing to mend."
            )

    def network(self, family: Family, config: NetworkConfig) -> Any:
        """Make a network that is told what the text encoders say."""
        told = text_states(encoders_of(family.pipe), [""]).shape[-1]
        return make_timeless_unet(config, family.latent_shape, told)

    def objective(self, materials: Materials) -> OneMoreStepObjective:
        """Make the objective."""
        dropped = self.settings.caption_dropout
        if dropped is None:
            dropped = 0.0 if isinstance(materials.pictures, Renders) else 0.1
        encode = partial(text_states, encoders_of(materials.family.pipe))
        return OneMoreStepObjective(
            materials.family, materials.examples, encode, materials.batch_size, materials.seed,
            dropped,
        )  # fmt: skip

    def result(self, model: Any, family: Family) -> OneMoreStepPipeline:
        """Give the pipeline; the text encoders are the model's own, and not saved with it."""
        return OneMoreStepPipeline(model, base=family.pipe)

    @torch.no_grad()
    def measure(self, model: Any, materials: Materials) -> dict[str, Any]:
        """Say how far the network is from the pictures, and how far 0 would be."""
        objective, count = self.objective(materials), min(SAMPLES, len(materials.examples))
        batch = noisy_batch(
            materials.family, materials.examples, count, 0, Shard(0, 1), seed=materials.seed, stream=MEASURED
        )  # fmt: skip
        error = 0.0
        for some in torch.arange(count).split(64):
            told = objective.encode([batch.captions[k] for k in some.tolist()])
            velocity = model(batch.noise[some], 0, told).sample
            error += float((velocity + batch.clean[some]).square().flatten(1).mean(1).sum())
        return {"error": error / count, "mean_square": float(batch.clean.square().mean())}


if __name__ == "__main__":
    main(OneMoreStep, OneMoreStepConfig, TRAINING, __doc__.splitlines()[0])
