"""The networks that are trained, sized for a model's latents: UNets without a time, and encoder halves of UNets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from sfumato.pipelines.minority_classifier import MinorityClassifier
from sfumato.restoration.networks import check_widths
from sfumato.settings import check_ranges, check_types

__all__ = ["NetworkConfig", "make_classifier", "make_timeless_unet"]

SMALL = 32
"""Latents of smaller sides get the small networks."""


@dataclass
class NetworkConfig:
    """What the network looks like; None goes by the size of the model's latents.

    Attributes:
        channels: Of each resolution, the finest first; each is half as fine as the one before.
        layers_per_block: Residual blocks at each resolution.
        attention_levels: How many of the coarsest resolutions have attention.
        attention_head_dim: Channels of each attention head.
        norm_num_groups: Groups of the normalisations.
    """

    channels: list[int] | None = field(default=None, metadata={"nargs": "+"})
    layers_per_block: int | None = None
    attention_levels: int | None = None
    attention_head_dim: int = 32
    norm_num_groups: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_types(self)
        counts = ("layers_per_block", "attention_head_dim", "norm_num_groups")
        check_ranges(self, {**dict.fromkeys(counts, 1), "attention_levels": 0})

    def shape(
        self, latent_shape: tuple[int, int, int], small: list[int], large: list[int], attending: int | None
    ) -> tuple[list[int], int, int, int]:
        """Give channels, layers of a block, levels with attention, and groups of the normalisations.

        Args:
            latent_shape: Channels, height and width.
            small: Channels for small latents, if none are given.
            large: For others.
            attending: Levels with attention, if none are given; None is all but the finest.

        Raises:
            ValueError: If they do not fit together, or the latents.
        """
        is_small = min(latent_shape[1:]) < SMALL
        channels = self.channels or (small if is_small else large)
        layers = self.layers_per_block or (1 if is_small else 2)
        usual = len(channels) - 1 if attending is None else attending
        levels = usual if self.attention_levels is None else self.attention_levels
        groups = self.norm_num_groups or (
            8 if is_small else 32
        )  # a group of a channel or two forgets how bright it is
        check_widths(channels, levels, groups, self.attention_head_dim)
        step = 2 ** (len(channels) - 1)
        if any(side % step for side in latent_shape[1:]):
            sides = " x ".join(map(str, latent_shape[1:]))
            raise ValueError(
                f"A network of {len(channels)} resolutions takes sides that {step} divides, and the model's are"
                f" {sides}: change `channels`."
            )
        return channels, layers, levels, groups


def make_timeless_unet(config: NetworkConfig, latent_shape: tuple[int, int, int], told: int) -> UNet2DConditionModel:
    """Build a stock network in which the time has no effect: its projections are zero, and are not trained.

    Args:
        config: What it looks like; None are 160, 320 and 640 channels, two layers and attention at all resolutions
            but the finest, as the authors published them, and of small latents 64 and 64 with one layer.
        latent_shape: Channels, height and width of its input, and its output.
        told: The width of the text encoder's states.
    """
    channels, layers, levels, groups = config.shape(latent_shape, [64, 64], [160, 320, 640], None)
    attends = [level >= len(channels) - levels for level in range(len(channels))]
    unet = UNet2DConditionModel(
        sample_size=_side(latent_shape), in_channels=latent_shape[0], out_channels=latent_shape[0],
        block_out_channels=tuple(channels), layers_per_block=layers, cross_attention_dim=told,
        attention_head_dim=tuple(max(1, width // config.attention_head_dim) for width in channels),
        norm_num_groups=groups, time_embedding_dim=8,
        down_block_types=tuple("CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)),
    )  # fmt: skip
    with torch.no_grad():
        for name, value in unet.named_parameters():
            if name.startswith("time_embedding.") or ".time_emb_proj." in name:
                value.zero_().requires_grad_(False)
    return unet


def make_classifier(
    config: NetworkConfig, latent_shape: tuple[int, int, int], classes: int, pool: str
) -> MinorityClassifier:
    """Build a classifier of noisy samples.

    Args:
        config: What it looks like; None are 64 and 128 channels with one layer for small latents, else 128 to 512 with
            two, and attention at the coarsest resolution.
        latent_shape: Channels, height and width of its input.
        classes: Of its output.
        pool: ``"attention"`` or ``"average"``.
    """
    channels, layers, levels, groups = config.shape(latent_shape, [64, 128], [128, 256, 384, 512], 1)
    return MinorityClassifier(
        num_classes=classes, in_channels=latent_shape[0], sample_size=_side(latent_shape),
        block_out_channels=channels, layers_per_block=layers, attention_levels=levels,
        attention_head_dim=config.attention_head_dim, norm_num_groups=groups, pool=pool,
    )  # fmt: skip


def _side(latent_shape: tuple[int, int, int]) -> Any:
    """The size of a sample, as configs hold it."""
    _, height, width = latent_shape
    return height if height == width else (height, width)
