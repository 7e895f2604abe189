"""Class-conditional models: pixel-space `UNet2DModel`, and DiT on latents. A concept is a class."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline

from sfumato.families.family import Conditioning, Family, Subsets
from sfumato.families.latent_space import LatentSpace

__all__ = ["ClassConditionalDDPM", "DiT", "class_names", "class_numbers"]


def class_numbers(pipe: DiffusionPipeline) -> dict[str, int] | None:
    """Give the number of every name of a class of a pipeline; None if it is not of this family.

    DiT's classes have the names that the pipeline's ``labels`` give them, others are ``"class 0"`` and so on.
    """
    kind = type(pipe).__name__
    if kind == "DiTPipeline":
        count, labels = pipe.transformer.config.num_embeds_ada_norm, dict(getattr(pipe, "labels", None) or {})
    elif kind == "ClassConditionalPipeline":
        count, labels = pipe.unet.config.num_class_embeds - 1, {}
    else:
        return None
    return labels | {f"class {number}": number for number in range(count) if number not in labels.values()}


def class_names(pipe: DiffusionPipeline) -> list[str] | None:
    """Give one name of each class, in the order of their numbers; None if the pipeline is not of this family."""
    numbers = class_numbers(pipe)
    if numbers is None:
        return None
    first = {number: name for name, number in reversed(numbers.items())}
    return [first[number] for number in sorted(first)]


class _ClassConditional(Family):
    """What they share. A "prompt" is the name of a class, and the empty one the null class.

    Args:
        pipe: The pipeline; it is read, never changed.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        super().__init__(pipe)
        self.names = class_names(pipe) or []

    @property
    def class_names(self) -> list[str]:
        """One name of each class, in the order of their numbers."""
        return self.names

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Give ``class_labels`` ``(B,)`` of classes named; ValueError if one is unknown."""
        numbers = (class_numbers(self.pipe) or {}) | {"": len(self.names)}
        for prompt in prompts:
            if prompt not in numbers:
                raise ValueError(f"The model has no class {prompt!r}; it has {', '.join(self.names[:5])}, ...")
        return {"class_labels": torch.tensor([numbers[prompt] for prompt in prompts], device=self.device)}


class ClassConditionalDDPM(_ClassConditional):
    """Pixels in [-1, 1] are the latents.

    Args:
        pipe: sfumato's ``ClassConditionalPipeline``; it is read, never changed.
    """

    label, denoiser_name = "class-conditional DDPM", "unet"
    subsets: ClassVar[Mapping[str, Subsets]] = {
        "denoiser": {
            "full": lambda name: True,
            "selfattn": lambda name: "attentions." in name,
            "notime": lambda name: (
                not name.startswith(("time_embedding.", "class_embedding.", "conv_norm_out.", "conv_out."))
                and ".time_emb_proj." not in name
            ),
        }
    }

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of one picture."""
        return self.latent_shape[1:]

    @property
    def image_channels(self) -> int:
        """Channels of a picture."""
        return self.latent_shape[0]

    def predict(
        self, denoiser: torch.nn.Module, latents: torch.Tensor, model_times: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Run a denoiser; see `Family.predict`."""
        return denoiser(latents, model_times, **conditioning).sample

    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale pictures ``(B, 3, H, W)`` in [0, 1]; their std is 0."""
        return 2 * images - 1, torch.zeros_like(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scale latents back to pictures ``(B, 3, H, W)`` in [0, 1], float32."""
        return (latents.float() / 2 + 0.5).clamp(0, 1)

    def generate(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        num_inference_steps: int,
        guidance_scale: float,
        latents_only: bool = False,
        conditioning: Conditioning | None = None,
    ) -> torch.Tensor:
        """Draw one picture a class; see `Family.generate`."""
        labels = (conditioning or self.encode_prompts(prompts))["class_labels"]
        with self._quiet():
            pictures = self.pipe(
                labels, generator=list(generators), num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale, output_type="pt",
            ).images.to(self.device)  # fmt: skip
        return 2 * pictures - 1 if latents_only else pictures


class DiT(_ClassConditional):
    """Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748.

    Args:
        pipe: A ``DiTPipeline``; it is read, never changed.
    """

    label, denoiser_name = "DiT", "transformer"
    subsets: ClassVar[Mapping[str, Subsets]] = {
        "denoiser": {
            "full": lambda name: True,
            "selfattn": lambda name: ".attn1." in name,
            "notime": lambda name: ".norm1.emb." not in name and not name.startswith("proj_out_"),
        }
    }

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of one picture at the model's native size."""
        scale = 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)
        return self.latent_shape[1] * scale, self.latent_shape[2] * scale

    def predict(
        self, denoiser: torch.nn.Module, latents: torch.Tensor, model_times: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Run a denoiser; what it says of the variance is left out. See `Family.predict`."""
        return denoiser(latents, timestep=model_times, **conditioning).sample[:, : latents.shape[1]]

    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode pictures ``(B, 3, H, W)`` in [0, 1]; gives the posterior's mean and std in model units."""
        return LatentSpace(self.pipe).posterior(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents ``(B, C, H, W)`` in model units; gives pictures ``(B, 3, H, W)`` in [0, 1], float32."""
        return LatentSpace(self.pipe).decode_grid(latents)

    def with_parts(self, parts: Mapping[str, torch.nn.Module]) -> DiffusionPipeline:
        """Make a pipeline with other parts; see `Family.with_parts`. It keeps the names of the classes."""
        made = super().with_parts(parts)
        made.labels = self.pipe.labels
        names: dict[int, list[str]] = {}
        for name, number in self.pipe.labels.items():
            names.setdefault(number, []).append(name)
        if names:  # which the pipeline reads, but does not write by itself
            made.register_to_config(id2label={str(number): ", ".join(known) for number, known in names.items()})
        return made

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        num_inference_steps: int,
        guidance_scale: float,
        latents_only: bool = False,
        conditioning: Conditioning | None = None,
    ) -> torch.Tensor:
        """Draw one picture a class, with the pipeline's scheduler; the pipeline itself gives no latents."""
        named = conditioning or self.encode_prompts(prompts)
        null = self.encode_prompts([""] * len(prompts))
        dtype = self.dtype
        noise = [torch.randn(self.latent_shape, generator=generator) for generator in generators]
        scheduler: Any = copy.deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(num_inference_steps, device=self.device)
        latents = torch.stack(noise).to(self.device, dtype) * scheduler.init_noise_sigma
        takes = "generator" in inspect.signature(scheduler.step).parameters
        for time in scheduler.timesteps:
            scaled, times = scheduler.scale_model_input(latents, time), time.expand(len(latents))
            said = self.predict(self.denoiser, scaled, times, named)
            if guidance_scale != 1:
                free = self.predict(self.denoiser, scaled, times, null)
                said = free + guidance_scale * (said - free)
            extra = {"generator": list(generators)} if takes else {}
            latents = scheduler.step(said, time, latents, **extra).prev_sample.to(dtype)
        return latents if latents_only else self.decode(latents)
