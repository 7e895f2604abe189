"""Model families: the only place that knows how Stable Diffusion differs from what will stand beside it.

A family answers six questions about a pipeline: which module is the denoiser, how prompts become its conditioning, how
pictures become latents and back, where the noise schedule lives, what the network predicts, and how a picture is
drawn. Everything else in the library asks a family and never looks into a pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

__all__ = [
    "Conditioning",
    "LatentSpace",
    "StableDiffusion",
    "family_of",
    "latent_space_of",
]

Conditioning = dict[str, torch.Tensor]
"""Keyword arguments of a denoiser, each with the batch first."""


class LatentSpace:
    """Between pictures and the latents that a text-to-image pipeline takes and gives, whatever its denoiser.

    Args:
        pipe: A pipeline with an `AutoencoderKL`; it is read, never changed.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe, self.vae = pipe, pipe.vae
        denoiser = getattr(pipe, "transformer", None) or pipe.unet
        self.dtype: torch.dtype = denoiser.dtype
        self.device: torch.device = denoiser.device

    def preprocess(self, image: Any) -> torch.Tensor:
        """Give pictures ``(B, 3, H, W)`` in [0, 1], float32, of a size that the autoencoder can take.

        Args:
            image: A PIL picture, a list of them of one size, or a tensor ``(B, 3, H, W)`` in [0, 1]. Sides that are
                no multiple of 8, which pipelines ask for, are scaled down to one.
        """
        if isinstance(image, torch.Tensor) and (image.ndim != 4 or image.min() < 0 or image.max() > 1):
            raise ValueError(
                f"Pictures must be PIL, or a tensor (B, 3, H, W) in [0, 1]; got shape {tuple(image.shape)}, values in "
                f"[{image.min():.3g}, {image.max():.3g}]."
            )
        if isinstance(image, PIL.Image.Image):
            image = [image]
        if not isinstance(image, torch.Tensor):
            if not image or not all(isinstance(one, PIL.Image.Image) for one in image):
                raise ValueError("There is no picture: give one of PIL, a list of them, or a tensor (B, 3, H, W).")
            if len({one.size for one in image}) > 1:
                raise ValueError(f"Pictures must have one size, got {sorted({one.size for one in image})}.")
            image = [one.convert("RGB") for one in image]
        height, width = image.shape[-2:] if isinstance(image, torch.Tensor) else image[0].size[::-1]
        unit = math.lcm(8, self.pipe.image_processor.config.vae_scale_factor)  # pipelines ask for multiples of 8
        size = {"height": height // unit * unit, "width": width // unit * unit}
        if 0 in size.values():
            raise ValueError(f"Pictures must be at least {unit} x {unit} pixels, got {height} x {width}.")
        images = self.pipe.image_processor.preprocess(image, **size).float()  # (B, 3, H, W) in [-1, 1]
        if not torch.isfinite(images).all():
            raise ValueError("A picture holds values that are not finite (NaN or infinity).")
        return (images / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def posterior(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode pictures ``(B, 3, H, W)`` in [0, 1]; returns the posterior's mean and std, ``(B, C, h, w)``."""
        with self._wide_vae() as parameter:
            distribution = self.vae.encode((2 * images - 1).to(parameter)).latent_dist
            mean, scale = self._statistics(parameter)
            return (distribution.mean - mean) * scale, distribution.std * scale

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode pictures ``(B, 3, H, W)`` in [0, 1] into the pipeline's layout, in the dtype of its denoiser."""
        return self.posterior(images)[0].to(self.device, self.dtype).contiguous()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, size: Sequence[int] | None = None) -> torch.Tensor:
        """Decode latents in the pipeline's layout.

        Args:
            latents: What the pipeline takes and gives.
            size: Height and width of the pictures, where the layout does not tell them (Flux).

        Returns:
            Pictures ``(B, 3, H, W)`` in [0, 1], float32.
        """
        with self._wide_vae() as parameter:
            mean, scale = self._statistics(parameter)
            images = self.vae.decode(latents.to(parameter) / scale + mean).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @contextmanager
    def _wide_vae(self) -> Iterator[torch.Tensor]:
        """Give a parameter of the autoencoder, made float32 meanwhile if its config says that float16 overflows."""
        dtype = self.vae.dtype
        upcast = dtype == torch.float16 and self.vae.config.get("force_upcast", False)
        try:
            if upcast:
                self.vae.to(dtype=torch.float32)
            yield next(self.vae.parameters())
        finally:
            if upcast:
                self.vae.to(dtype=dtype)

    def _statistics(self, like: torch.Tensor) -> tuple[Any, Any]:
        """Mean and scale of the autoencoder's own latents, which make model units of them."""
        config = self.vae.config
        means, stds = config.get("latents_mean"), config.get("latents_std")
        if means is not None and stds is not None:
            mean, std = (torch.tensor(values).to(like).view(1, -1, 1, 1) for values in (means, stds))
            return mean, config.scaling_factor / std
        return config.get("shift_factor") or 0.0, config.scaling_factor


class PackedLatentSpace(LatentSpace):
    """Flux: each 2x2 patch of latents is one token, ``(B, h/2 * w/2, 4 C)``."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Give the latents of pictures ``(B, 3, H, W)`` in [0, 1] as tokens ``(B, h/2 * w/2, 4 C)``."""
        grid = super().encode(images)
        batch, channels, height, width = grid.shape
        patches = grid.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(batch, height * width // 4, 4 * channels)

    def decode(self, latents: torch.Tensor, size: Sequence[int] | None = None) -> torch.Tensor:
        """Decode tokens of pictures of a size (height, width); gives pictures ``(B, 3, H, W)`` in [0, 1], float32."""
        if size is None:
            raise ValueError("Tokens do not tell the height and width of their picture: give `size`.")
        rows, columns = (side // (2 * self.pipe.vae_scale_factor) for side in size)
        patches = latents.view(len(latents), rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return super().decode(patches.reshape(len(latents), -1, 2 * rows, 2 * columns))


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
    def origin(self) -> str | None:
        """The Hub id that the model was loaded from, or its folder's name; None if it was made otherwise."""
        origin = self.pipe.config.get("_name_or_path")
        if not origin:
            return None
        return Path(origin).name if Path(origin).is_dir() else str(origin)

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

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of one picture at the model's native size."""
        scale = 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)
        _, height, width = self.latent_shape
        return height * scale, width * scale

    def check_dtypes(self) -> None:
        """Refuse, with a ValueError, a text encoder and a denoiser of different dtypes; the autoencoder's is free."""
        encoder, denoiser = self.pipe.text_encoder.dtype, self.denoiser.dtype
        if encoder != denoiser:
            raise ValueError(
                f"The text encoder is {encoder} and the {self.denoiser_name} {denoiser}, but they must be the same; "
                "use pipe.to(torch.float32), or load the whole pipeline with one dtype."
            )

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

    def tokenize(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut prompts into tokens as the stock pipeline does.

        Args:
            prompts: ``B`` prompts.

        Returns:
            Token numbers ``(B, T)``, with the start, the end and padding, and how many each prompt has itself
            ``(B,)``, at most ``T - 2``; on the pipeline's device.
        """
        tokenizer = self.pipe.tokenizer
        texts = [self.pipe.maybe_convert_prompt(prompt, tokenizer) for prompt in prompts]
        length = tokenizer.model_max_length
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        counts = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        return tokens.input_ids.to(self.device), torch.tensor([len(ids) - 2 for ids in counts], device=self.device)

    @property
    def token_table(self) -> torch.Tensor:
        """The embeddings of all tokens, ``(vocabulary, width)``, float32, without a gradient."""
        layer: torch.nn.Embedding = self.pipe.text_encoder.get_input_embeddings()
        return layer.weight.detach().float()

    def encode_embeddings(
        self, encoder: torch.nn.Module, tokens: torch.Tensor, embeddings: torch.Tensor
    ) -> Conditioning:
        """Encode prompts of which the token embeddings are given, so that a gradient can reach these.

        transformers' CLIP takes no embeddings itself, so they take the place of what its (public) input embedding
        gives; the encoder adds the positions.

        Args:
            encoder: `parts`' text encoder, a copy of it, or one wrapped by accelerate.
            tokens: Their numbers ``(B, T)``, see `tokenize`; they tell no more than the shape.
            embeddings: ``(B, T, width)``.

        Returns:
            As `encode_prompts`.
        """
        bare: Any = getattr(encoder, "module", encoder)
        layer = bare.get_input_embeddings()
        hook = layer.register_forward_hook(lambda *_: embeddings.to(layer.weight.dtype))
        try:
            return {"encoder_hidden_states": encoder(tokens)[0]}
        finally:
            hook.remove()

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

    def split(
        self, prediction: torch.Tensor, latents: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take noisy latents apart into what a raw prediction says they are made of.

        Args:
            prediction: What `predict` gave, ``(B, C, H, W)``.
            latents: The noisy latents it was given, ``(B, C, H, W)``.
            timesteps: Their times ``(B,)``.

        Returns:
            The clean latents x_0 and the noise, ``(B, C, H, W)`` each; `add_noise` puts them together again.
        """
        signal, sigma = self._scales(timesteps, latents)
        if self.prediction_type == "epsilon":
            return (latents - sigma * prediction) / signal, prediction
        if self.prediction_type == "sample":
            return prediction, (latents - signal * prediction) / sigma
        return signal * latents - sigma * prediction, signal * prediction + sigma * latents

    def predict_noise(
        self, denoiser: torch.nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Run a denoiser as `predict` does; give the noise ``(B, C, H, W)``, float32, whatever it predicts and in."""
        dtype = next(denoiser.parameters()).dtype
        conditioning = {name: values.to(dtype) for name, values in conditioning.items()}
        raw = self.predict(denoiser, latents.to(dtype), timesteps, conditioning)
        return self.split(raw.float(), latents.float(), timesteps)[1]

    def inference_timesteps(self, num_inference_steps: int) -> torch.Tensor:
        """Give the descending times ``(N,)`` that a sampler of the pipeline's config visits, on the CPU."""
        scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(num_inference_steps)
        return scheduler.timesteps.long().cpu()

    def _scales(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alphas = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return alphas.sqrt().to(like), (1 - alphas).sqrt().to(like)

    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode pictures ``(B, 3, H, W)`` in [0, 1]; returns the posterior's mean and std in model units."""
        return LatentSpace(self.pipe).posterior(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents ``(B, C, H, W)`` in model units; returns pictures ``(B, 3, H, W)`` in [0, 1], float32."""
        return LatentSpace(self.pipe).decode(latents)

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
        """Draw one picture a prompt with the pipeline's own loop and scheduler.

        Args:
            prompts: ``B`` prompts.
            generators: ``B`` generators, one a picture, so that a picture does not depend on its batch.
            num_inference_steps: Sampler steps.
            guidance_scale: Classifier-free guidance; 1 is none.
            latents_only: Give latents ``(B, C, H, W)`` in model units instead of pictures.
            conditioning: What to show in place of the prompts, as `encode_prompts` gives it, ``B`` rows.

        Returns:
            Pictures ``(B, 3, H, W)`` in [0, 1], float32, or latents, on the pipeline's device.
        """
        asked: dict[str, Any] = {"prompt": list(prompts)}
        if conditioning is not None:
            empty = self.encode_prompts([""] * len(prompts))
            asked = {
                "prompt_embeds": conditioning["encoder_hidden_states"].to(self.pipe.text_encoder.dtype),
                "negative_prompt_embeds": empty["encoder_hidden_states"],
            }
        hidden = getattr(self.pipe, "_progress_bar_config", {})
        self.pipe.set_progress_bar_config(**{**hidden, "disable": True})
        try:
            latents = self.pipe(
                **asked, generator=list(generators), num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale, output_type="latent",
            ).images  # fmt: skip
        finally:
            self.pipe.set_progress_bar_config(**hidden)
        return latents if latents_only else self.decode(latents)

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        """What a method may change: ``"denoiser"`` and ``"text_encoder"``."""
        return {"denoiser": self.denoiser, "text_encoder": self.pipe.text_encoder}

    def trainable_parameters(self, subset: str, part: str = "denoiser") -> list[str]:
        """Name the parameters of a part that belong to a subset.

        Args:
            subset: ``"full"``: all (of a text encoder: all but its embeddings). For the denoiser also ``"xattn"``
                (cross-attention, diffusers' ``attn2``), ``"xattn-kv"`` (its key and value projections), ``"selfattn"``
                (``attn1``), ``"noxattn"`` (all but cross-attention, the time embedding and the last layers: ESD-u) and
                ``"notime"`` (all but the last two).
            part: Whose.

        Returns:
            Parameter names, in the module's order.

        Raises:
            ValueError: If the subset is unknown or empty.
        """
        keep = _SUBSETS[part]
        if subset not in keep:
            raise ValueError(f"Unknown parameter subset {subset!r} of the {part}; choose from {', '.join(keep)}.")
        names = [name for name, _ in self.parts[part].named_parameters() if keep[subset](name)]
        if not names:
            raise ValueError(f"The {part} has no parameters in the subset {subset!r}.")
        return names

    def with_parts(self, parts: Mapping[str, torch.nn.Module]) -> DiffusionPipeline:
        """Make a pipeline that shares every component with this one but the parts given, by the names of `parts`."""
        named = {self.denoiser_name if name == "denoiser" else name: module for name, module in parts.items()}
        optional = {"requires_safety_checker": self.pipe.config.get("requires_safety_checker", False)}
        made = type(self.pipe)(**{**self.pipe.components, **named}, **optional)
        if self.pipe.config.get("_name_or_path"):
            made.register_to_config(_name_or_path=self.pipe.config["_name_or_path"])
        return made


def _outside_blocks(name: str) -> bool:
    """Whether a parameter belongs to the time embedding or to the layers that make the output."""
    return name.startswith(("time_embedding.", "conv_norm_out.", "conv_out.")) or ".time_emb_proj." in name


_SUBSETS: Mapping[str, Mapping[str, Callable[[str], bool]]] = {
    "denoiser": {
        "full": lambda name: True,
        "xattn": lambda name: "attn2" in name,
        "xattn-kv": lambda name: "attn2.to_k" in name or "attn2.to_v" in name,
        "selfattn": lambda name: "attn1" in name,
        "noxattn": lambda name: "attn2" not in name and not _outside_blocks(name),
        "notime": lambda name: not _outside_blocks(name),
    },
    "text_encoder": {"full": lambda name: "embeddings" not in name},
}


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


_LATENT_SPACES: Mapping[str, type[LatentSpace]] = {
    "StableDiffusionPipeline": LatentSpace,
    "StableDiffusionXLPipeline": LatentSpace,
    "StableDiffusion3Pipeline": LatentSpace,
    "FluxPipeline": PackedLatentSpace,
}


def latent_space_of(pipe: DiffusionPipeline) -> LatentSpace:
    """Find how a text-to-image pipeline turns pictures into latents and back.

    Args:
        pipe: A diffusers pipeline.

    Raises:
        ValueError: If the pipeline is not supported; the message names those that are.
    """
    name = type(pipe).__name__
    if name not in _LATENT_SPACES:
        raise ValueError(f"{name} can't be inverted; supported pipelines: {', '.join(_LATENT_SPACES)}.")
    return _LATENT_SPACES[name](pipe)
