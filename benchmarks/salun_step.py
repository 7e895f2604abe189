"""Time a training step of SalUn against the released algorithm: ``python benchmarks/salun_step.py``.

Side by side on one model, at one batch and the recipe's optimiser and mask. The released program keeps its sets as
pictures: every step it encodes the forget pictures twice and the retain pictures once with the autoencoder, encodes
three lists of prompts, and runs the denoiser three times. Here posteriors and prompts are encoded once before the
training, and the two predictions that are trained share a pass. Both draw the same number of pictures first, which is
not part of a step. The times are medians over all steps but the first two of each run, which make room for gradients
and moments; runs take turns.

``--model sd15`` is Stable Diffusion 1.5 with random weights at 256x256: there the autoencoder is a larger part of the
work than on the embedded model. By default denoiser and autoencoder have half their width, so that there is room for a
batch of four, and the arithmetic outweighs the passes over the weights as it does on an accelerator. ``--width 1`` is
the whole network; it needs 20 GB at a batch of one, and both then take plain gradient steps, since Adam's moments
would not fit beside.
"""

import copy
import json
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from timing import step_times
from transformers import CLIPTextConfig, CLIPTextModel

import sfumato
from sfumato import concepts, recipes
from sfumato.arguments import make_parser
from sfumato.evaluation.generation import draw

LIMIT = 1.5
KEEP = ("a bag", "a coat", "a dog in the snow", "a house by the sea")


@dataclass
class StepConfig:
    """What to time.

    Attributes:
        model: ``"atelier"`` or ``"sd15"``.
        steps: Steps of each in a round that count.
        rounds: Rounds.
        width: Channels of sd15, as a share of those it has.
        batch_size: Forget pictures in a step, and as many retain pictures; 0 is the recipe's, or for sd15 4, or 1 if
            it is wider than half.
        threads: CPU threads; 0 leaves the choice to torch.
    """

    model: str = field(default="atelier", metadata={"choices": ["atelier", "sd15"]})
    steps: int = 20
    rounds: int = 3
    width: float = 0.5
    batch_size: int = 0
    threads: int = 0


def stable_diffusion(size: int, width: float) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 with random weights for pictures of `size`, and the embedded model's tokenizer."""
    narrow, wide = (tuple(round(width * k * first) for k in (1, 2, 4, 4)) for first in (128, 320))
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    tokenizer = sfumato.load("atelier").tokenizer
    tokenizer.model_max_length = text.max_position_embeddings
    vae = AutoencoderKL(
        block_out_channels=narrow, layers_per_block=2, latent_channels=4, sample_size=size,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    schedule = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, scheduler=schedule, safety_checker=None,
        unet=UNet2DConditionModel(sample_size=size // 8, block_out_channels=wide, cross_attention_dim=768),
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass
class Case:
    """A model, what it is to forget, and how."""

    pipe: Any
    settings: dict[str, Any]
    retain: tuple[str, ...] | None = None

    @classmethod
    def of(cls, config: StepConfig) -> "Case":
        """Make the case that is asked for."""
        if config.model == "atelier":
            pipe = sfumato.load("atelier")
            settings = dict(recipes.find_recipe("salun", pipe, "sneaker").settings)
            examples = {"forget_examples": 64, "retain_examples": 64, "example_steps": 5}
            case = cls(pipe, {**settings, **examples})
        else:
            large = config.width > 0.5
            settings = {"optimizer": "sgd" if large else "adam", "learning_rate": 1e-5, "retain_weight": 0.5}
            examples = {"forget_examples": 2, "retain_examples": 2, "example_steps": 1, "example_batch_size": 1}
            settings |= {**examples, "mask_ratio": 0.5, "batch_size": 1 if large else 4}
            case = cls(stable_diffusion(256, config.width), settings, KEEP)
        case.settings["batch_size"] = config.batch_size or case.settings["batch_size"]
        return case


class Released:
    """The released training step, written down as it is, on diffusers alone; it trains the case's own denoiser."""

    def __init__(self, case: Case) -> None:
        self.pipe, self.settings, self.batch = case.pipe, case.settings, case.settings["batch_size"]
        self.count = self.settings["forget_examples"]
        concept = concepts.resolve(self.pipe, "sneaker", retain=case.retain)
        self.anchors = dict(zip(concept.prompts, concept.anchors, strict=True))
        lists = (concept.prompts, concept.retain)
        self.forget, self.retain = ([prompts[k % len(prompts)] for k in range(self.count)] for prompts in lists)
        self.forget_pictures, self.retain_pictures = (
            2 * draw(
                self.pipe, prompts, num_inference_steps=self.settings["example_steps"], batch_size=64, description=None
            ) - 1
            for prompts in (self.forget, self.retain)
        )  # fmt: skip
        self.schedule = DDPMScheduler.from_config(self.pipe.scheduler.config)
        self.model = self.pipe.unet.requires_grad_(True)
        self.mask = {name: torch.rand_like(value) < self.settings["mask_ratio"] for name, value in
                     self.model.named_parameters()}  # fmt: skip
        optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[self.settings.get("optimizer", "adam")]
        self.optimizer = optimizer(self.model.parameters(), lr=self.settings["learning_rate"])

    @torch.no_grad()
    def get_input(self, pixels: torch.Tensor, captions: list[str]) -> tuple[torch.Tensor, ...]:
        """Encode pictures ``(B, 3, H, W)`` in [-1, 1] and their captions."""
        latents = self.pipe.vae.encode(pixels).latent_dist.sample() * self.pipe.vae.config.scaling_factor
        return latents, self.pipe.encode_prompt(captions, "cpu", 1, False)[0]

    def step(self) -> None:
        """Relabel the forget batch, denoise the retain batch."""
        rows = torch.randint(self.count, (2, self.batch))
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


def own_steps(case: Case, steps: int) -> list[float]:
    """Times of our steps."""
    settings = {**case.settings, "steps": steps + 2}
    return step_times(lambda: sfumato.unlearn(case.pipe, "sneaker", retain=case.retain, verify=False, **settings))


def released_steps(case: Case, steps: int) -> list[float]:
    """Times of steps as released."""
    released = Released(Case(copy.deepcopy(case.pipe), case.settings, case.retain))
    return step_times(lambda: [released.step() for _ in range(steps + 2)])


def main(config: StepConfig) -> None:
    """Measure and print."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    case = Case.of(config)
    times: dict[str, list[float]] = {"released": [], "sfumato": []}
    for _ in range(config.rounds):
        times["sfumato"] += own_steps(case, config.steps)
        times["released"] += released_steps(case, config.steps)
    batch, (other, own) = case.settings["batch_size"], (statistics.median(steps) for steps in times.values())
    print(f"{config.model}, batch {batch} + {batch}")
    print(f"as released {1000 * other:7.1f} ms a step\nsfumato     {1000 * own:7.1f} ms a step")
    print(f"throughput  {other / own:.2f} x (limit {LIMIT})")
    print(json.dumps({"released": other, "sfumato": own, "ratio": other / own}))


if __name__ == "__main__":
    main(make_parser(StepConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
