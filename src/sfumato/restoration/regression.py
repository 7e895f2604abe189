"""The baseline of restoration: one pass through a network of the same size, trained with L1 on the same pairs.

    x0 = y + network(y, 0, condition),    loss = mean |x0 - clean|

It is what a chain has to be better than in the distance of features: in PSNR it is hard to beat, as it gives the
median of all pictures that may have been. It is trained by `sfumato.restoration.job`, as the chains are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ImagePipelineOutput, UNet2DModel
from torch import nn

from sfumato import storage
from sfumato.pipelines.restoration import condition_on_grid, decode_latents, degraded_start, encode_pixels
from sfumato.restoration.examples import Examples, predict
from sfumato.restoration.job import Method
from sfumato.restoration.networks import Autoencoder, NetworkConfig, load_autoencoder
from sfumato.trainer import Shard

__all__ = ["Regression", "RegressionConfig", "RegressionObjective", "make"]


class RegressionObjective:
    """Absolute error of the restored picture.

    Args:
        examples: What to learn from.
        patch_size: Blocks that are folded into channels for the network.
    """

    def __init__(self, examples: Examples, patch_size: int) -> None:
        self.examples, self.patch_size, self.batch_size = examples, patch_size, examples.batch_size

    def losses(self, model: nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """See `sfumato.trainer.Objective`."""
        batch = self.examples.draw(model, step, shard)
        assert batch.degraded is not None
        return {"l1": (restored(model, batch.degraded, batch.condition, self.patch_size) - batch.clean).abs().mean()}


def restored(
    model: nn.Module, degraded: torch.Tensor, condition: torch.Tensor | None, patch_size: int
) -> torch.Tensor:
    """Restore pictures ``(B, C, h, w)`` on the grid of a chain in one pass."""
    times = torch.zeros(len(degraded), dtype=torch.long, device=degraded.device)
    return degraded + predict(model, degraded, condition, times, patch_size)


@dataclass
class RegressionConfig:
    """There is nothing to set."""


class Regression:
    """What restores pictures with a trained network; it is called as the restoration pipelines are.

    Args:
        unet: The network.
        vae: The autoencoder whose latents it works in, if there is one.
        scale: Size of the result over that of the picture.
        patch_size: Blocks that are folded into channels for the network.
        masked: Whether the network is given a mask.
        conditioned: Whether it is given the degraded picture twice, as chains are.
    """

    def __init__(
        self, unet: UNet2DModel, vae: Autoencoder | None = None, *, scale: int = 1, patch_size: int = 1,
        masked: bool = False, conditioned: bool = True,
    ) -> None:  # fmt: skip
        self.unet, self.vae = unet, vae
        self.config = {"scale": scale, "patch_size": patch_size, "masked": masked, "conditioned": conditioned}

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Do nothing: one pass needs no bar."""

    @torch.no_grad()
    def __call__(self, image: Any = None, mask_image: Any = None, **unused: Any) -> ImagePipelineOutput:
        """Restore pictures of one size.

        Args:
            image: ``(B, 3, h, w)`` in [0, 1].
            mask_image: ``(B, 1, h, w)``, 1 in holes; what is outside of them is kept.
            unused: What pipelines take beside these.

        Returns:
            ``images``, ``(B, 3, H, W)`` in [0, 1], on the CPU.
        """
        scale = int(self.config["scale"])
        picture = (2 * image - 1).to(self.unet.device, self.unet.dtype)
        mask = None if mask_image is None else (2 * mask_image - 1).to(picture)
        degraded = encode_pixels(self.vae, degraded_start(picture, scale))
        told = condition_on_grid(picture, mask, degraded.shape[-2:]) if self.config["conditioned"] else None
        found = decode_latents(self.vae, restored(self.unet, degraded, told, int(self.config["patch_size"])))
        pixels = (found.float() / 2 + 0.5).clamp(0, 1).cpu()
        if mask_image is not None:
            pixels = torch.where(mask_image > 0.5, pixels, image)
        return ImagePipelineOutput(images=pixels)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the network, the autoencoder if there is one, and ``regression.json`` into a folder."""
        folder = Path(save_directory)
        self.unet.save_pretrained(folder / "unet", safe_serialization=True)
        if self.vae is not None:
            self.vae.save_pretrained(folder / "vae", safe_serialization=True)
        storage.write_text(folder / "regression.json", json.dumps(self.config))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Regression:
        """Read what `save_pretrained` wrote."""
        folder = Path(folder)
        vae = load_autoencoder(str(folder)) if (folder / "vae").exists() else None
        unet = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True)
        return cls(unet.eval(), vae, **storage.read_json(folder / "regression.json"))


def make(config: RegressionConfig, network: NetworkConfig) -> Method:
    """Give what `sfumato.restoration.job` needs to train it."""

    def objective(examples: Examples) -> RegressionObjective:
        return RegressionObjective(examples, network.patch_size)

    def assemble(unet: Any, vae: Any, settings: Mapping[str, Any]) -> Regression:
        return Regression(unet, vae, **settings)

    return Method("regression", "one-pass regression (L1)", config, objective, assemble)
