"""Between pictures and the latents that a pipeline takes and gives, whatever its denoiser."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import PIL.Image
import torch
from diffusers import DiffusionPipeline

__all__ = ["LatentSpace", "PackedLatentSpace", "latent_space_of"]


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

    def decode(self, latents: torch.Tensor, size: Sequence[int] | None = None) -> torch.Tensor:
        """Decode latents in the pipeline's layout.

        Args:
            latents: What the pipeline takes and gives.
            size: Height and width of the pictures, where the layout does not tell them (Flux).

        Returns:
            Pictures ``(B, 3, H, W)`` in [0, 1], float32.
        """
        return self.decode_grid(latents)

    @torch.no_grad()
    def decode_grid(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents ``(B, C, h, w)``; gives pictures ``(B, 3, H, W)`` in [0, 1], float32."""
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
        return self.pack(super().encode(images))

    def decode(self, latents: torch.Tensor, size: Sequence[int] | None = None) -> torch.Tensor:
        """Decode tokens of pictures of a size (height, width); gives pictures ``(B, 3, H, W)`` in [0, 1], float32."""
        if size is None:
            raise ValueError("Tokens do not tell the height and width of their picture: give `size`.")
        rows, columns = (side // (2 * self.pipe.vae_scale_factor) for side in size)
        return self.decode_grid(self.unpack(latents, rows, columns))

    @staticmethod
    def pack(grid: torch.Tensor) -> torch.Tensor:
        """Turn latents ``(B, C, h, w)`` into tokens ``(B, h/2 * w/2, 4 C)``."""
        batch, channels, height, width = grid.shape
        patches = grid.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(batch, height * width // 4, 4 * channels)

    @staticmethod
    def unpack(tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Turn tokens ``(B, rows * columns, 4 C)`` into latents ``(B, C, 2 rows, 2 columns)``."""
        patches = tokens.view(len(tokens), rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(len(tokens), -1, 2 * rows, 2 * columns)


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
