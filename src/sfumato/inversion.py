"""Inversion: the noise from which a pipeline draws a given picture, and editing by drawing from it anew.

The pipeline's own loop does the work, with a scheduler that walks from the picture to the noise; what the network is
told, guidance, text encoders and attention are therefore those of the pipeline, whatever its family.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from sfumato import storage
from sfumato.evaluation.metrics import psnr
from sfumato.families import LatentSpace, latent_space_of
from sfumato.schedulers.noise_schedule import stock_settings
from sfumato.schedulers.reversible import Latent, LatentPair

__all__ = [
    "SCHEDULERS",
    "Edit",
    "Inversion",
    "NoiseStatistics",
    "edit",
    "edit_inverted",
    "invert",
    "make_sampler",
    "noise_statistics",
]

SCHEDULERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bdia": ("sfumato.schedulers.scheduling_bdia", "BDIAScheduler", {}),
    "belm": ("sfumato.schedulers.scheduling_belm", "BELMScheduler", {}),
    "edict": ("sfumato.schedulers.scheduling_edict", "EDICTScheduler", {}),
    "ddim": ("sfumato.schedulers.scheduling_fixed_point", "FixedPointScheduler", {"num_iterations": 1}),
    "fixed-point": ("sfumato.schedulers.scheduling_fixed_point", "FixedPointScheduler", {}),
    "ddpm": ("sfumato.schedulers.scheduling_edit_friendly_ddpm", "EditFriendlyDDPMScheduler", {}),
}
"""Schedulers by name: module, class, settings. The first three invert exactly, the last by storing its noise."""


@dataclass(frozen=True)
class NoiseStatistics:
    """How far latents are from independent standard normal noise; averages over the samples of a batch.

    Attributes:
        mean: Of all values of a sample; 0 for noise.
        std: Of all values of a sample; 1 for noise.
        kurtosis: Excess kurtosis; 0 for noise.
        correlation: Between neighbours along the last axis; 0 for noise.
        distance: Kolmogorov-Smirnov distance to the standard normal distribution; about 0.87 / sqrt(n) for noise of n
            values.
        expected_distance: That figure for the n at hand.
    """

    mean: float
    std: float
    kurtosis: float
    correlation: float
    distance: float
    expected_distance: float


def noise_statistics(latents: torch.Tensor) -> NoiseStatistics:
    """Measure how normal latents ``(B, ...)`` are; see `NoiseStatistics`."""
    x = latents.detach().double().cpu()
    rows = x.flatten(1)  # (B, n)
    count = rows.shape[1]
    centred = rows - rows.mean(1, keepdim=True)
    variance = centred.square().mean(1)
    grid = x - x.flatten(1).mean(1).view(-1, *[1] * (x.ndim - 1))
    neighbours = (grid[..., 1:] * grid[..., :-1]).flatten(1).mean(1) / variance
    expected = torch.distributions.Normal(0.0, 1.0).cdf(rows.sort(1).values)
    ranks = torch.arange(count, dtype=torch.float64)
    above, below = ((ranks + 1) / count - expected).amax(1), (expected - ranks / count).amax(1)
    return NoiseStatistics(
        mean=rows.mean().item(),
        std=variance.sqrt().mean().item(),
        kurtosis=(centred.pow(4).mean(1) / variance.square() - 3).mean().item(),
        correlation=neighbours.mean().item(),
        distance=torch.maximum(above, below).mean().item(),
        expected_distance=0.8687 / math.sqrt(count),
    )


@dataclass
class Inversion:
    """What an inversion found: all that is needed to draw the picture again, or to draw it anew with another prompt.

    Attributes:
        latents: The noisiest latents, ``(B, ...)`` in the layout and dtype of the pipeline.
        clean_latents: The picture's latents, from which it started, in the same layout.
        images: The pictures themselves, ``(B, 3, H, W)`` in [0, 1], float32.
        pair: Both latents of the scheduler's state, or None where one is enough.
        scheduler_class: Class of the scheduler.
        scheduler_config: Its config, for sampling.
        noises: The noise that a stochastic scheduler stored, else None.
        prompt: The prompts, one a picture.
        num_inference_steps: Steps of the whole schedule, before `strength` leaves some out.
        guidance_scale: That of the inversion.
        condition_number: How much an error may have grown on the way (1: not at all); None if not known.
        noise: How normal the latents are; only meaningful at strength 1.
        pipeline_arguments: What else the pipeline is called with.
    """

    latents: torch.Tensor
    clean_latents: torch.Tensor
    images: torch.Tensor
    pair: LatentPair | None
    scheduler_class: type
    scheduler_config: dict[str, Any]
    noises: torch.Tensor | None
    prompt: list[str]
    num_inference_steps: int
    guidance_scale: float
    condition_number: float | None
    noise: NoiseStatistics
    pipeline_arguments: dict[str, Any]

    def scheduler(self) -> Any:
        """Make the sampling scheduler, set to start from this inversion: for ``pipe(latents=inversion.latents)``."""
        scheduler = self.scheduler_class.from_config(self.scheduler_config)  # type: ignore[attr-defined]
        if self.noises is not None:
            scheduler.set_noises(self.latents, self.noises)
        elif self.pair is not None:
            scheduler.set_pair(self.pair)
        return scheduler

    def sample_latents(
        self,
        pipe: DiffusionPipeline,
        prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        **pipeline_arguments: Any,
    ) -> torch.Tensor:
        """Draw latents from the noise found; arguments as for `sample`."""
        prompts = self.prompt if prompt is None else _one_each(prompt, len(self.images), "prompt")
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        arguments = {**self.pipeline_arguments, **pipeline_arguments}
        if prompt is not None:  # the other forms of the inversion's prompt say another thing
            stale = [name for name in _PROMPT_TOO if name not in pipeline_arguments]
            arguments = {name: value for name, value in arguments.items() if name not in stale}
        return _run(pipe, self.scheduler(), self.latents, prompts, scale, self, arguments)

    def sample(
        self,
        pipe: DiffusionPipeline,
        prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        **pipeline_arguments: Any,
    ) -> torch.Tensor:
        """Draw pictures from the noise found.

        Args:
            pipe: The pipeline that was inverted, or another of its kind.
            prompt: One for all pictures or one each; None takes those of the inversion, which reconstructs.
            guidance_scale: None takes that of the inversion.
            **pipeline_arguments: In place of those of the inversion, ``prompt_embeds`` for instance.

        Returns:
            Pictures ``(B, 3, H, W)`` in [0, 1], float32.
        """
        latents = self.sample_latents(pipe, prompt, guidance_scale, **pipeline_arguments)
        return latent_space_of(pipe).decode(latents, self.images.shape[-2:])

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file, bit for bit; `load` reads it.

        Args:
            path: The file; replaced if it exists.
        """
        tensors = {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}
        for member, latent in zip(("first", "second"), (self.pair or ())[:2], strict=False):
            tensors |= {f"{member}.{name}": part for name, part in latent._asdict().items() if part is not None}
        arguments = self.pipeline_arguments
        tensors |= {f"argument.{name}": value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        plain = {name: value for name, value in arguments.items() if not isinstance(value, torch.Tensor)}
        settings = {name: getattr(self, name) for name in _SETTINGS} | {
            "pipeline_arguments": plain,
            "scheduler_class": self.scheduler_class.__name__, "noise": asdict(self.noise),
            "pair_steps": self.pair.steps if self.pair else None,
        }  # fmt: skip
        return storage.save_tensors(path, tensors, {"inversion": settings})

    @classmethod
    def load(cls, path: str | Path) -> Inversion:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or holds something else.
        """
        tensors, settings = storage.load_tensors(path), storage.read_metadata(path).get("inversion")
        if not isinstance(settings, dict):
            raise ValueError(f"{path} holds no inversion; give a file written by Inversion.save or `sfumato invert`.")
        home = {name: module for module, name, _ in SCHEDULERS.values()}
        name = settings["scheduler_class"]
        first, second = (_latent(tensors, member) for member in ("first", "second"))
        pair = LatentPair(first, second, settings["pair_steps"]) if first and second else None
        fields: dict[str, Any] = {name: tensors.get(name) for name in _TENSORS}
        fields |= {name: settings[name] for name in _SETTINGS}
        given = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith("argument.")}
        fields["pipeline_arguments"] = {**fields["pipeline_arguments"], **given}
        return cls(
            **fields, scheduler_class=getattr(import_module(home[name]), name),
            noise=NoiseStatistics(**settings["noise"]), pair=pair,
        )  # fmt: skip


def _latent(tensors: Mapping[str, torch.Tensor], member: str) -> Latent | None:
    """One latent of a saved pair; None if there was no pair."""
    if f"{member}.value" not in tensors:
        return None
    return Latent(tensors[f"{member}.value"], tensors.get(f"{member}.whole"), tensors.get(f"{member}.fraction"))


_PROMPT_TOO = ("prompt_2", "prompt_3", "prompt_embeds", "pooled_prompt_embeds")
_OWN_ARGUMENTS = ("height", "width", "output_type", "return_dict", "num_images_per_prompt", "sigmas", "timesteps")
_TENSORS = ("latents", "clean_latents", "images", "noises")
_SETTINGS = (
    "scheduler_config",
    "prompt",
    "num_inference_steps",
    "guidance_scale",
    "condition_number",
    "pipeline_arguments",
)


@dataclass
class Edit:
    """An edited picture, with what is needed to judge how much of the change is the method's and not the prompt's.

    Attributes:
        images: The edited pictures, ``(B, 3, H, W)`` in [0, 1], float32.
        originals: The pictures given.
        reconstructions: Drawn from the same noise with the source prompt and scale.
        autoencoded: The originals through the autoencoder alone: the best that any inversion can give.
        inversion: The inversion behind it.
        latent_error: Root mean square of the reconstruction's error in latents, relative to that of the latents.
        autoencoder_psnr: Of `autoencoded` against `originals`, in dB, averaged over pictures.
        reconstruction_psnr: Of `reconstructions` against `originals`.
    """

    images: torch.Tensor
    originals: torch.Tensor
    reconstructions: torch.Tensor
    autoencoded: torch.Tensor
    inversion: Inversion
    latent_error: float
    autoencoder_psnr: float
    reconstruction_psnr: float


def invert(
    pipe: DiffusionPipeline,
    image: Any,
    prompt: str | Sequence[str] = "",
    *,
    scheduler: Any = "bdia",
    num_inference_steps: int = 50,
    strength: float = 1.0,
    guidance_scale: float = 1.0,
    latents: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    **pipeline_arguments: Any,
) -> Inversion:
    """Find the noise from which a pipeline draws a picture.

    Args:
        pipe: A text-to-image pipeline: Stable Diffusion 1.x, 2.x, XL or 3, or Flux; it is left as it was.
        image: A PIL picture, a list of them, or a tensor ``(B, 3, H, W)`` in [0, 1].
        prompt: What the picture shows; one for all or one each.
        scheduler: A name (`SCHEDULERS`), or a sampling scheduler of ours whose settings are to be used, such as
            ``BDIAScheduler.from_config(pipe.scheduler.config, exact=True)``.
        num_inference_steps: Steps of the schedule.
        strength: Share of the steps to take, from the picture up: at 1 it ends at pure noise.
        guidance_scale: Guidance of the inversion; a reconstruction is exact if it is drawn with the same.
        latents: Latents in the layout of the pipeline, to invert in place of those that the autoencoder gives.
        generator: Source of the noise of a stochastic scheduler (``"ddpm"``).
        **pipeline_arguments: Passed on to the pipeline, here and in sampling: ``negative_prompt``, for instance.

    Returns:
        The `Inversion`: its ``sample`` draws the picture again, or anew with another prompt.

    Raises:
        ValueError: For an unsupported pipeline or scheduler, or a strength that leaves fewer than two steps.
    """
    space = latent_space_of(pipe)
    refused = [name for name in _OWN_ARGUMENTS if name in pipeline_arguments]
    if refused:
        raise ValueError(f"`{refused[0]}` is not for the caller to give: the inversion sets it itself.")
    sampler = _sampler(pipe, scheduler, num_inference_steps, strength)
    images = space.preprocess(image)
    prompts = _one_each(prompt, len(images), "prompt")
    walker = type(sampler).from_config(sampler.config, inverse=True)
    if latents is not None and len(latents) != len(images):
        raise ValueError(f"`latents` must hold one for each of the {len(images)} pictures, got {len(latents)}.")
    clean = space.encode(images) if latents is None else latents.to(space.device, space.dtype)
    start = clean
    if hasattr(walker, "set_source"):  # it must know the times to draw its noise
        walker.set_timesteps(num_inference_steps)
        start = walker.set_source(clean, generator)
    found = Inversion(
        latents=clean, clean_latents=clean, images=images, pair=None, scheduler_class=type(sampler),
        scheduler_config=dict(sampler.config), noises=None, prompt=prompts, num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale, condition_number=None, noise=noise_statistics(clean),
        pipeline_arguments=pipeline_arguments,
    )  # fmt: skip
    output = _run(pipe, walker, start, prompts, guidance_scale, found, pipeline_arguments)
    found.pair, found.noises = getattr(walker, "pair", None), getattr(walker, "noises", None)
    if found.noises is not None:
        found.latents = walker.initial.to(clean.dtype)
    else:
        found.latents = output if found.pair is None else found.scheduler().set_pair(found.pair).to(clean.dtype)
    found.condition_number = getattr(walker, "condition_number", None)
    found.noise = noise_statistics(found.latents)
    return found


def edit(
    pipe: DiffusionPipeline,
    image: Any,
    source_prompt: str | Sequence[str],
    target_prompt: str | Sequence[str],
    *,
    scheduler: Any = "edict",
    num_inference_steps: int = 50,
    strength: float = 0.8,
    guidance_scale: float = 3.0,
    source_guidance_scale: float = 1.0,
    generator: torch.Generator | None = None,
    **pipeline_arguments: Any,
) -> Edit:
    """Change a picture by inverting it with one prompt and drawing it again with another.

    Args:
        pipe: As for `invert`.
        image: As for `invert`.
        source_prompt: What the picture shows.
        target_prompt: What it is to show.
        scheduler: As for `invert`; the default, EDICT, draws its two latents together as it samples. BDIA with gamma 1
            and O-BELM do not: they reconstruct as exactly, but every other step keeps to the source prompt's course.
        num_inference_steps: As for `invert`.
        strength: Share of the steps to take: the less, the closer the result stays to the picture.
        guidance_scale: Guidance towards the target prompt.
        source_guidance_scale: Guidance of the inversion and the reconstruction.
        generator: As for `invert`.
        **pipeline_arguments: As for `invert`.

    Returns:
        The `Edit`, with the reconstruction and its errors.
    """
    found = invert(
        pipe, image, source_prompt, scheduler=scheduler, num_inference_steps=num_inference_steps, strength=strength,
        guidance_scale=source_guidance_scale, generator=generator, **pipeline_arguments,
    )  # fmt: skip
    return edit_inverted(pipe, found, target_prompt, guidance_scale)


def edit_inverted(
    pipe: DiffusionPipeline, found: Inversion, target_prompt: str | Sequence[str] | None, guidance_scale: float
) -> Edit:
    """Draw an inverted picture again with its own prompt and with another (None: only again); see `edit`."""
    space, size = latent_space_of(pipe), found.images.shape[-2:]
    again = found.sample_latents(pipe)
    reconstructions, autoencoded = space.decode(again, size), space.decode(found.clean_latents, size)
    difference = (again.double() - found.clean_latents.double()).square().mean().sqrt()
    edited = reconstructions if target_prompt is None else found.sample(pipe, target_prompt, guidance_scale)
    return Edit(
        images=edited,
        originals=found.images,
        reconstructions=reconstructions,
        autoencoded=autoencoded,
        inversion=found,
        latent_error=(difference / found.clean_latents.double().square().mean().sqrt()).item(),
        autoencoder_psnr=psnr(autoencoded, found.images),
        reconstruction_psnr=psnr(reconstructions, found.images),
    )


def make_sampler(pipe: DiffusionPipeline, name: str, **options: Any) -> Any:
    """Make an invertible scheduler for a pipeline's model by its name.

    Args:
        pipe: The pipeline; its scheduler's config tells the noise schedule.
        name: One of `SCHEDULERS`.
        **options: Settings of that scheduler, such as ``exact=True``.

    Raises:
        ValueError: If the name or an option is unknown.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"Unknown scheduler {name!r}; choose from {', '.join(SCHEDULERS)}.")
    module, class_name, settings = SCHEDULERS[name]
    made = getattr(import_module(module), class_name)
    known = inspect.signature(made).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"{class_name} has no setting {unknown[0]!r}.")
    reversible = {key: False for key in ("clip_sample", "thresholding") if key in known}
    return made.from_config(stock_settings(pipe.scheduler.config), **{**reversible, **settings, **options})


def _sampler(pipe: DiffusionPipeline, scheduler: Any, steps: int, strength: float) -> Any:
    """The sampling scheduler, with the steps left out that `strength` does without."""
    if not 0 < strength <= 1:
        raise ValueError(f"`strength` must lie in (0, 1], got {strength}.")
    if isinstance(scheduler, str):
        scheduler = make_sampler(pipe, scheduler)
    if isinstance(scheduler, type):
        raise ValueError(f"{scheduler.__name__} is a class: give a scheduler made of it, or a name.")
    if "inverse" not in getattr(scheduler, "config", {}):
        raise ValueError(
            f"{type(scheduler).__name__} can't be inverted; give one of {', '.join(SCHEDULERS)}, or such a scheduler."
        )
    taken = int(steps * strength)
    if taken < 2:
        raise ValueError(f"An inversion takes at least 2 steps, but strength {strength} leaves {taken} of {steps}.")
    return type(scheduler).from_config(scheduler.config, inverse=False, skip_steps=steps - taken)


def _one_each(prompt: str | Sequence[str], count: int, name: str) -> list[str]:
    """Give a text for each of so many pictures; ValueError if that is not what was given."""
    if not isinstance(prompt, str) and not (
        isinstance(prompt, Sequence) and all(isinstance(text, str) for text in prompt)
    ):
        raise ValueError(f"`{name}` must be a text or a list of texts, got {prompt!r}.")
    prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
    if len(prompts) != count:
        raise ValueError(f"`{name}` must be one for all {count} pictures or one each, got {len(prompts)}.")
    return prompts


def _run(
    pipe: DiffusionPipeline,
    scheduler: Any,
    latents: torch.Tensor,
    prompts: list[str],
    guidance_scale: float,
    found: Inversion,
    arguments: Mapping[str, Any],
) -> torch.Tensor:
    """Run a pipeline's own loop from given latents with another scheduler, and give the latents it ends with."""
    space: LatentSpace = latent_space_of(pipe)
    height, width = found.images.shape[-2:]
    arguments = {
        name: _one_each(value, len(prompts), name) if isinstance(value, str) and "prompt" in name else value
        for name, value in arguments.items()
    }
    if "prompt_embeds" not in arguments:
        arguments["prompt"] = prompts
    usual = pipe.scheduler
    pipe.scheduler = scheduler
    try:
        return pipe(
            latents=latents.to(space.dtype), num_inference_steps=found.num_inference_steps,
            guidance_scale=guidance_scale, height=height, width=width, output_type="latent",
            **arguments,
        ).images  # fmt: skip
    finally:
        pipe.scheduler = usual
