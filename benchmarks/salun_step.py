"""Time a training step of SalUn against the released algorithm: ``python benchmarks/salun_step.py``.

Side by side on the embedded model, at one batch and the recipe's optimiser and mask. The released program keeps its
sets as pictures: every step it encodes the forget pictures twice and the retain pictures once with the autoencoder,
encodes three lists of prompts, and runs the denoiser three times. Here posteriors and prompts are encoded once before
the training, and the two predictions that are trained share a pass. Both draw the same number of pictures first, which
is not part of a step. The times are medians of rounds in which the two take turns.
"""

import json
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

import sfumato
from sfumato import concepts, recipes
from sfumato.arguments import make_parser
from sfumato.evaluation.generation import draw

LIMIT = 1.5


@dataclass
class StepConfig:
    """What to time.

    Attributes:
        steps: Steps of each in a round.
        rounds: Rounds; the first of each warms up and is not counted.
        batch_size: Forget pictures in a step, and as many retain pictures; 0 is the recipe's.
        threads: CPU threads; 0 leaves the choice to torch.
    """

    steps: int = 20
    rounds: int = 4
    batch_size: int = 0
    threads: int = 0


class Released:
    """The released training step, written down as it is, on diffusers alone."""

    def __init__(self, settings: dict[str, Any], batch_size: int) -> None:
        self.pipe, self.settings, self.batch = sfumato.load("atelier"), settings, batch_size
        concept = concepts.resolve(self.pipe, "sneaker")
        self.anchors = dict(zip(concept.prompts, concept.anchors, strict=True))
        self.forget, self.retain = ([p[k % len(p)] for k in range(64)] for p in (concept.prompts, concept.retain))
        self.forget_pictures, self.retain_pictures = (
            2 * draw(self.pipe, prompts, num_inference_steps=5, description=None) - 1
            for prompts in (self.forget, self.retain)
        )
        self.schedule = DDPMScheduler.from_config(self.pipe.scheduler.config)
        self.model = self.pipe.unet.requires_grad_(True)
        self.mask = {name: torch.rand_like(value) < settings["mask_ratio"] for name, value in
                     self.model.named_parameters()}  # fmt: skip
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings["learning_rate"])

    @torch.no_grad()
    def get_input(self, pixels: torch.Tensor, captions: list[str]) -> tuple[torch.Tensor, ...]:
        """Encode pictures ``(B, 3, H, W)`` in [-1, 1] and their captions."""
        latents = self.pipe.vae.encode(pixels).latent_dist.sample() * self.pipe.vae.config.scaling_factor
        return latents, self.pipe.encode_prompt(captions, "cpu", 1, False)[0]

    def step(self) -> None:
        """Relabel the forget batch, denoise the retain batch."""
        rows = torch.randint(64, (2, self.batch))
        captions = [self.forget[k] for k in rows[0].tolist()]
        pixels, kept = self.forget_pictures[rows[0]], [self.retain[k] for k in rows[1].tolist()]
        forget, forget_text = self.get_input(pixels, captions)
        pseudo, pseudo_text = self.get_input(pixels, [self.anchors[caption] for caption in captions])
        remain, remain_text = self.get_input(self.retain_pictures[rows[1]], kept)
        times, noise = torch.randint(1000, (2, self.batch)), torch.randn(2, *forget.shape)
        said = self.model(self.schedule.add_noise(remain, noise[0], times[0]), times[0], remain_text).sample
        remain_loss = F.mse_loss(said, noise[0])
        student = self.model(self.schedule.add_noise(forget, noise[1], times[1]), times[1], forget_text).sample
        with torch.no_grad():
            teacher = self.model(self.schedule.add_noise(pseudo, noise[1], times[1]), times[1], pseudo_text).sample
        loss = F.mse_loss(student, teacher) + self.settings["retain_weight"] * remain_loss
        self.optimizer.zero_grad()
        loss.backward()
        for name, parameter in self.model.named_parameters():
            parameter.grad *= self.mask[name]
        self.optimizer.step()


def seconds(call: Any) -> float:
    """Time a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def own_run(settings: dict[str, Any], steps: int) -> float:
    """Time a whole run of ours on few examples."""
    few = {"forget_examples": 64, "retain_examples": 64, "example_steps": 5}
    pipe = sfumato.load("atelier")
    return seconds(lambda: sfumato.unlearn(pipe, "sneaker", verify=False, **{**settings, **few, "steps": steps}))


def main(config: StepConfig) -> None:
    """Measure and print."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    settings = dict(recipes.find_recipe("salun", sfumato.load("atelier"), "sneaker").settings)
    settings["batch_size"] = config.batch_size or settings["batch_size"]
    released = Released(settings, settings["batch_size"])
    ours, theirs = [], []
    for _ in range(config.rounds):
        longer, shorter = own_run(settings, config.steps + 1), own_run(settings, 1)
        ours.append((longer - shorter) / config.steps)
        theirs.append(seconds(lambda: [released.step() for _ in range(config.steps)]) / config.steps)
    own, other = (statistics.median(values[1:]) for values in (ours, theirs))
    print(f"batch {settings['batch_size']} + {settings['batch_size']}")
    print(f"as released {1000 * other:7.1f} ms a step\nsfumato     {1000 * own:7.1f} ms a step")
    print(f"throughput  {other / own:.2f} x (limit {LIMIT})")
    print(json.dumps({"released": other, "sfumato": own, "ratio": other / own}))


if __name__ == "__main__":
    main(make_parser(StepConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
