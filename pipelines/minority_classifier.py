r"""A classifier of noisy samples: what minority guidance is steered by, p(y | x_t, t).

Um, Lee, Ye, "Don't Play Favorites: Minority Guidance for Diffusion Models", ICLR 2024, arXiv 2301.12334. The classes
are those of the minority score, from the commonest samples to the rarest. The network is the encoder half of a
diffusion model's UNet, told the time, with a pool over all places and a linear layer behind it. Written from the
paper, not from its released program (commit e7e69bd), which puts a small such encoder behind a frozen one that
ImageNet was classified with; here all of it is trained, so that it works in any model's latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from torch import Tensor, nn

__all__ = ["AttentionPool", "MinorityClassifier"]

POOLS = ("attention", "average")


class MinorityClassifier(ModelMixin, ConfigMixin):
    """Say of noisy samples how rare they are, for [`MinorityGuidanceScheduler`].

        classifier = MinorityClassifier.from_pretrained(folder)
        pipe.scheduler = MinorityGuidanceScheduler.from_config(pipe.scheduler.config, guidance_scale=3.5)
        pipe.scheduler.set_classifier(classifier)

    Args:
        num_classes (`int`): Number L of classes; the last is that of the rarest.
        in_channels (`int`): Channels of a sample.
        sample_size (`int` or pair of them): Height and width of a sample.
        block_out_channels (sequence of `int`): Of each resolution, the finest first; each is half as fine as the one
            before.
        layers_per_block (`int`): Residual blocks at each resolution.
        attention_levels (`int`): How many of the coarsest resolutions have self-attention; the middle always has it.
        attention_head_dim (`int`): Channels of each attention head.
        norm_num_groups (`int`): Groups of the normalisations.
        pool (`str`): `"attention"`, of samples of `sample_size` alone, or `"average"`.
        thresholds (list of `float`, *optional*): The scores at which the classes end, but the last, ascending: a
            record, of which nothing depends here.

    Raises:
        ValueError: For fewer than two classes, another pool, or thresholds that are not such.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        num_classes: int = 100,
        in_channels: int = 3,
        sample_size: int | Sequence[int] = 32,
        block_out_channels: Sequence[int] = (64, 128),
        layers_per_block: int = 2,
        attention_levels: int = 1,
        attention_head_dim: int = 32,
        norm_num_groups: int = 32,
        pool: Literal["attention", "average"] = "attention",
        thresholds: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"`num_classes` must be at least 2, got {num_classes}.")
        if pool not in POOLS:
            raise ValueError(f"`pool` must be one of {', '.join(POOLS)}, got {pool!r}.")
        if thresholds is not None and (len(thresholds) != num_classes - 1 or list(thresholds) != sorted(thresholds)):
            raise ValueError(f"`thresholds` must be {num_classes - 1} ascending scores, one fewer than classes.")
        widths, levels = tuple(block_out_channels), len(block_out_channels)
        told = 4 * widths[0]
        self.time_proj = Timesteps(widths[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(widths[0], told)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            get_down_block(
                "AttnDownBlock2D" if level >= levels - attention_levels else "DownBlock2D",
                num_layers=layers_per_block, in_channels=widths[max(level - 1, 0)], out_channels=widths[level],
                temb_channels=told, add_downsample=level < levels - 1, resnet_eps=1e-5, resnet_act_fn="silu",
                resnet_groups=norm_num_groups, attention_head_dim=attention_head_dim, downsample_padding=1,
            )
            for level in range(levels)
        )  # fmt: skip
        self.mid_block = UNetMidBlock2D(
            in_channels=widths[-1], temb_channels=told, resnet_eps=1e-5, resnet_act_fn="silu",
            attention_head_dim=attention_head_dim, resnet_groups=norm_num_groups,
        )  # fmt: skip
        self.norm_out = nn.GroupNorm(norm_num_groups, widths[-1], eps=1e-5)
        self.gather = (
            None if pool == "average" else AttentionPool(widths[-1], self._places(), widths[-1] // attention_head_dim)
        )
        self.classify = nn.Linear(widths[-1], num_classes)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a sample."""
        size = self.config.sample_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def _places(self) -> int:
        """Places of the coarsest resolution."""
        height, width = self.size
        for _ in self.config.block_out_channels[1:]:
            height, width = -(-height // 2), -(-width // 2)
        return height * width

    def forward(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """Give the logits of the classes.

        Args:
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): x_t, as the denoiser takes it.
            timestep (`torch.Tensor` of shape `(batch,)`, or a number): t.

        Returns:
            `(batch, num_classes)`, float32.

        Raises:
            ValueError: If samples have other channels, or another size and the pool attends.
        """
        wanted = (self.config.in_channels, *(self.size if self.gather is not None else sample.shape[2:]))
        if sample.ndim != 4 or tuple(sample.shape[1:]) != wanted:
            raise ValueError(
                f"The classifier takes samples (batch, {', '.join(map(str, wanted))}), got {tuple(sample.shape)}: it"
                " is of another model."
            )
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))  # (B,)
        told = self.time_embedding(self.time_proj(times).to(self.dtype))  # (B, 4 * C0)
        state = self.conv_in(sample.to(self.dtype))
        for block in self.down_blocks:
            state = block(state, told)[0]
        state = F.silu(self.norm_out(self.mid_block(state, told)))  # (B, C, h, w)
        pooled = state.mean((2, 3)) if self.gather is None else self.gather(state)
        return self.classify(pooled).float()


class AttentionPool(nn.Module):
    """One vector of a map: the mean over its places asks all of them.

    Args:
        channels: Of the map.
        places: Height times width.
        heads: Of the attention.
    """

    def __init__(self, channels: int, places: int, heads: int) -> None:
        super().__init__()
        self.heads = max(1, heads)
        self.positions = nn.Parameter(torch.randn(places + 1, channels) / channels**0.5)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, state: Tensor) -> Tensor:
        """Give ``(batch, channels)`` of ``(batch, channels, height, width)``."""
        tokens = state.flatten(2).transpose(1, 2)  # (B, P, C)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + self.positions.to(state.dtype)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.to_qkv(tokens).chunk(3, dim=-1)
        )  # (B, heads, P + 1, C / heads)
        asked = F.scaled_dot_product_attention(q[:, :, :1], k, v)  # (B, heads, 1, C / heads)
        return self.to_out(asked.flatten(1))
