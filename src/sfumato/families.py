"""Model families: the only place that knows how Stable Diffusion differs from what will stand beside it.

A family answers six questions about a pipeline: which module is the denoiser, how prompts become its conditioning, how
pictures become latents and back, where the noise schedule lives, what the network predicts, and how a picture is
drawn. Everything else in the library asks a family and never looks into a pipeline.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from sfumato import storage

__all__ = ["EMBEDDED", "Conditioning", "StableDiffusion", "assets_folder", "family_of", "load"]

Conditioning = dict[str, torch.Tensor]
"""Keyword arguments of a denoiser, each with the batch first."""

EMBEDDED = ("atelier", "atelier-pixel")


def assets_folder() -> Path:
    """Give the folder of the models and pictures that ship with the package."""
    return Path(__file__).parent / "assets"


def load(pretrained_model_name_or_path: str | Path = "atelier", **kwargs: Any) -> DiffusionPipeline:
    """Load a pipeline: an embedded model by name, a local folder, or a Hub id.

    Args:
        pretrained_model_name_or_path: ``"atelier"`` (text to picture, 32x32), ``"atelier-pixel"`` (class-conditional
            pixel DDPM, 16x16), a folder written by ``save_pretrained``, or an id on the Hugging Face Hub.
        **kwargs: Passed on to ``DiffusionPipeline.from_pretrained``; ``dtype`` is float32 unless given.

    Returns:
        The pipeline, on the CPU.

    Raises:
        FileNotFoundError: If it looks like a local folder and is none, or the Hub can't be reached.
        ValueError: If a weights file in the folder is corrupt or cut short.
    """
    name = str(pretrained_model_name_or_path)
    if not name.strip():
        raise ValueError("The model's name is empty: give 'atelier', a local folder or a Hub id.")
    folder = assets_folder() / name if name in EMBEDDED else Path(name)
    if folder.is_dir():
        _check_folder(folder)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"There is no model folder {name}.")
    if name == "atelier-pixel":
        from sfumato.pipelines.pipeline_class_conditional import ClassConditionalPipeline

        return ClassConditionalPipeline.from_pretrained(folder, **{"dtype": torch.float32, **kwargs})
    try:
        return DiffusionPipeline.from_pretrained(
            folder if folder.is_dir() else name, **{"dtype": torch.float32, **kwargs}
        )
    except OSError as error:
        if folder.is_dir():
            raise
        close = difflib.get_close_matches(name, EMBEDDED, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise FileNotFoundError(
            f"{name!r} is neither an embedded model ({', '.join(EMBEDDED)}), nor a folder here, nor could it be had "
            f"from the Hub. {hint}({error})"
        ) from error


def _check_folder(folder: Path) -> None:
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} is not a diffusers pipeline: it has no model_index.json.")
    try:
        json.loads((folder / "model_index.json").read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{folder / 'model_index.json'} is not valid JSON ({error}); fetch the model again."
        ) from error
    for file in sorted(folder.glob("*/*.safetensors")):
        storage.read_metadata(file)


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: one CLIP text encoder, `UNet2DConditionModel`, `AutoencoderKL`.

    Args:
        pipe: A ``StableDiffusionPipeline``; it is read, never changed.
    """

    denoiser_name = "unet"

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe
        config = pipe.scheduler.config
        if "shift" in config or not hasattr(pipe.scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{type(pipe.scheduler).__name__} has no betas (a flow-matching scheduler or EDM's), Stable Diffusion "
                "needs them; set pipe.scheduler = DDIMScheduler.from_pretrained(model, subfolder='scheduler')."
            )
        self.prediction_type = config.get("prediction_type", "epsilon")
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                f"Prediction type {self.prediction_type!r} is not one of 'epsilon', 'v_prediction', 'sample'; fix "
                "`prediction_type` in the scheduler's config."
            )
        self.alphas_cumprod: torch.Tensor = pipe.scheduler.alphas_cumprod.double().cpu()

    @property
    def denoiser(self) -> torch.nn.Module:
        """The network that methods train."""
        return self.pipe.unet

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    @property
    def num_train_timesteps(self) -> int:
        """The length of the noise schedule."""
        return len(self.alphas_cumprod)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent at the model's native size."""
        config = self.pipe.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts; cut to the text encoder's length as the stock pipeline does.

        Args:
            prompts: ``B`` prompts; ``""`` is the unconditional one.

        Returns:
            ``{"encoder_hidden_states": (B, tokens, width)}`` on the pipeline's device.
        """
        embeddings, _ = self.pipe.encode_prompt(
            list(prompts), self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeddings}

    def predict(
        self, denoiser: torch.nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Run a denoiser of this family.

        Args:
            denoiser: `self.denoiser`, a copy of it, or one wrapped by accelerate.
            latents: Noisy latents ``(B, C, H, W)`` in model units.
            timesteps: ``(B,)``, integers of the noise schedule.
            conditioning: What `encode_prompts` gave.

        Returns:
            The raw prediction ``(B, C, H, W)``; `target` says of what.
        """
        return denoiser(latents, timesteps, **conditioning).sample

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Give ``sqrt(A_t) x_0 + sqrt(1 - A_t) eps`` for latents and noise ``(B, C, H, W)``, timesteps ``(B,)``."""
        signal, sigma = self._scales(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Give what the network should predict: the noise, the velocity ``sqrt(A) eps - sqrt(1 - A) x_0``, or x_0."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        signal, sigma = self._scales(timesteps, latents)
        return signal * noise - sigma * latents

    def _scales(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alphas = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return alphas.sqrt().to(like), (1 - alphas).sqrt().to(like)

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode pictures ``(B, 3, H, W)`` in [0, 1]; returns the posterior's mean and std in model units."""
        vae = self.pipe.vae
        parameter = next(vae.parameters())
        posterior = vae.encode((2 * images - 1).to(parameter)).latent_dist
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (posterior.mean - shift) * vae.config.scaling_factor, posterior.std * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents ``(B, C, H, W)`` in model units; returns pictures ``(B, 3, H, W)`` in [0, 1], float32."""
        vae = self.pipe.vae
        parameter = next(vae.parameters())
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        images = vae.decode((latents / vae.config.scaling_factor + shift).to(parameter)).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def generate(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        num_inference_steps: int,
        guidance_scale: float,
        latents_only: bool = False,
    ) -> torch.Tensor:
        """Draw one picture a prompt with the pipeline's own loop and scheduler.

        Args:
            prompts: ``B`` prompts.
            generators: ``B`` generators, one a picture, so that a picture does not depend on its batch.
            num_inference_steps: Sampler steps.
            guidance_scale: Classifier-free guidance; 1 is none.
            latents_only: Give latents ``(B, C, H, W)`` in model units instead of pictures.

        Returns:
            Pictures ``(B, 3, H, W)`` in [0, 1], float32, or latents, on the pipeline's device.
        """
        hidden = getattr(self.pipe, "_progress_bar_config", {})
        self.pipe.set_progress_bar_config(**{**hidden, "disable": True})
        try:
            latents = self.pipe(
                prompt=list(prompts), generator=list(generators), num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale, output_type="latent",
            ).images  # fmt: skip
        finally:
            self.pipe.set_progress_bar_config(**hidden)
        return latents if latents_only else self.decode(latents)

    def trainable_parameters(self, subset: str) -> list[str]:
        """Name the denoiser's parameters in a subset.

        Args:
            subset: ``"full"`` (all), ``"xattn"`` (cross-attention, diffusers' ``attn2``), ``"xattn-kv"`` (its key and
                value projections) or ``"noxattn"`` (all but cross-attention).

        Returns:
            Parameter names, in the module's order.

        Raises:
            ValueError: If the subset is unknown or empty.
        """
        keep = {
            "full": lambda name: True,
            "xattn": lambda name: "attn2" in name,
            "xattn-kv": lambda name: "attn2.to_k" in name or "attn2.to_v" in name,
            "noxattn": lambda name: "attn2" not in name,
        }
        if subset not in keep:
            raise ValueError(f"Unknown parameter subset {subset!r}; choose from {', '.join(keep)}.")
        names = [name for name, _ in self.denoiser.named_parameters() if keep[subset](name)]
        if not names:
            raise ValueError(f"The denoiser has no parameters in the subset {subset!r}.")
        return names

    def with_denoiser(self, denoiser: torch.nn.Module) -> DiffusionPipeline:
        """Make a pipeline that shares every part of this one but the denoiser."""
        parts = {**self.pipe.components, self.denoiser_name: denoiser}
        optional = {"requires_safety_checker": self.pipe.config.get("requires_safety_checker", False)}
        made = type(self.pipe)(**parts, **optional)
        if self.pipe.config.get("_name_or_path"):
            made.register_to_config(_name_or_path=self.pipe.config["_name_or_path"])
        return made


_FAMILIES: Mapping[str, type[StableDiffusion]] = {
    "StableDiffusionPipeline": StableDiffusion,
}


def family_of(pipe: DiffusionPipeline) -> StableDiffusion:
    """Find the family of a pipeline.

    Args:
        pipe: A diffusers pipeline.

    Returns:
        The adapter that the rest of the library works with.

    Raises:
        ValueError: If the family is not supported; the message names those that are.
    """
    name = type(pipe).__name__
    if name not in _FAMILIES:
        raise ValueError(f"{name} is not supported yet; supported pipelines: {', '.join(_FAMILIES)}.")
    return _FAMILIES[name](pipe)
