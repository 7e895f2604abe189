"""The network of a restoration model: a ``UNet2DModel`` on the chain's grid, or two of them, one for each head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, UNet2DModel, VQModel
from torch import nn

from sfumato import storage
from sfumato.loading import check_part, folder_of
from sfumato.pipelines.restoration import condition_channels
from sfumato.settings import check_ranges, check_types

__all__ = ["Autoencoder", "Grid", "NetworkConfig", "TwoNetworks", "check_widths", "load_autoencoder", "make_unet"]

Autoencoder: TypeAlias = AutoencoderKL | VQModel


@dataclass
class NetworkConfig:
    """What the network looks like; the defaults are for pictures of 32x32.

    Attributes:
        vae: A folder, or a Hub id, with the autoencoder in whose latents the chain runs, or ``atelier``; None runs it
            in pixels.
        patch_size: Blocks of this side are folded into channels, for a cheaper network on the same chain.
        channels: Of each resolution, the finest first; each is half as fine as the one before.
        layers_per_block: Residual blocks at each resolution, one more on the way up.
        attention_levels: How many of the coarsest resolutions have self-attention.
        attention_head_dim: Channels of each attention head.
        norm_num_groups: Groups of the normalisations.
    """

    vae: str | None = None
    patch_size: int = 2
    channels: list[int] = field(default_factory=lambda: [48, 72, 96], metadata={"nargs": "+"})
    layers_per_block: int = 1
    attention_levels: int = 1
    attention_head_dim: int = 24
    norm_num_groups: int = 8

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_types(self)
        counts = ("patch_size", "layers_per_block", "attention_head_dim", "norm_num_groups")
        check_ranges(self, {**dict.fromkeys(counts, 1), "attention_levels": 0})
        check_widths(self.channels, self.attention_levels, self.norm_num_groups, self.attention_head_dim)


def check_widths(channels: list[int], attention_levels: int, norm_num_groups: int, attention_head_dim: int) -> None:
    """Raise a ValueError unless widths are such, and groups and heads divide them.

    Args:
        channels: Of each resolution, the finest first.
        attention_levels: How many of the coarsest have attention; the middle, as wide as the last, always has it.
        norm_num_groups: Groups of the normalisations.
        attention_head_dim: Channels of each attention head.
    """
    if not channels or any(not isinstance(width, int) or width < 1 for width in channels):
        raise ValueError(f"`channels` must be whole numbers from 1 on, one a resolution, got {channels}.")
    attending = channels[-max(1, attention_levels) :]
    for name, part, of in (
        ("norm_num_groups", norm_num_groups, channels), ("attention_head_dim", attention_head_dim, attending)
    ):  # fmt: skip
        uneven = next((width for width in of if width % part), None)
        if uneven is not None:
            raise ValueError(f"`{name}` {part} does not divide the {uneven} of `channels`.")


@dataclass(frozen=True)
class Grid:
    """Where the chain runs.

    Attributes:
        channels: Of its state: 3, or those of the latents.
        side: Its height and width.
        told: Channels of the condition that the network is given beside the state.
    """

    channels: int
    side: int
    told: int

    @classmethod
    def of(cls, vae: Autoencoder | None, size: int, scale: int, *, masked: bool, conditioned: bool) -> Grid:
        """Find it for pictures of a size.

        Args:
            vae: The autoencoder, if there is one.
            size: Height and width of the clean pictures.
            scale: Their size by that of the degraded ones.
            masked: Whether the network is given a mask.
            conditioned: Whether it is given the degraded picture.

        Raises:
            ValueError: If the autoencoder or the scale do not fit the size.
        """
        if vae is None:
            shrink, channels = 1, 3
        else:
            config: Any = vae.config
            shrink = 2 ** (len(config.block_out_channels) - 1)
            channels = getattr(config, "vq_embed_dim", None) or config.latent_channels
        if size % shrink:
            raise ValueError(f"The autoencoder shrinks by {shrink}, which does not divide the size, {size}.")
        told = condition_channels(scale, shrink, masked) if conditioned else 0
        return cls(channels, size // shrink, told)


def make_unet(config: NetworkConfig, grid: Grid, heads: int) -> UNet2DModel:
    """Build a network, untrained.

    Args:
        config: What it looks like.
        grid: Of the chain.
        heads: How many pictures it puts out.

    Returns:
        A ``UNet2DModel``; see `sfumato.pipelines.restoration.network_input` for what it is given.

    Raises:
        ValueError: If its resolutions do not fit the grid.
    """
    levels, patch = len(config.channels), config.patch_size
    if grid.side % (patch * 2 ** (levels - 1)):
        raise ValueError(
            f"A network of {levels} resolutions on patches of {patch} takes sides that {patch * 2 ** (levels - 1)} "
            f"divides, and the chain's is {grid.side}: change `size`, `channels` or `patch_size`."
        )
    attending = [level >= levels - config.attention_levels for level in range(levels)]
    return UNet2DModel(
        sample_size=grid.side // patch, in_channels=(grid.channels + grid.told) * patch**2,
        out_channels=heads * grid.channels * patch**2, block_out_channels=tuple(config.channels),
        layers_per_block=config.layers_per_block, attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        down_block_types=tuple("AttnDownBlock2D" if attends else "DownBlock2D" for attends in attending),
        up_block_types=tuple("AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attending)),
    )  # fmt: skip


class TwoNetworks(nn.Module):
    """A network for each of two heads, as one module, so that accelerate sees one.

    Args:
        unet: For the residual, or the clean picture.
        noise_unet: For the noise.
    """

    def __init__(self, unet: UNet2DModel, noise_unet: UNet2DModel) -> None:
        super().__init__()
        self.unet, self.noise_unet = unet, noise_unet

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""
        self.unet.enable_gradient_checkpointing()
        self.noise_unet.enable_gradient_checkpointing()

    def forward(
        self, model_input: torch.Tensor, times: tuple[torch.Tensor, torch.Tensor], return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        """Give both heads, one after the other in the channels, as a network of two heads does.

        Args:
            model_input: See `sfumato.pipelines.restoration.network_input`.
            times: What each network is told, ``(B,)``.
            return_dict: Without effect; as a single network takes it.
        """
        pairs = zip((self.unet, self.noise_unet), times, strict=True)
        return (torch.cat([unet(model_input, time, return_dict=False)[0] for unet, time in pairs], dim=1),)


def load_autoencoder(name: str) -> Autoencoder:
    """Load an autoencoder, frozen, float32.

    Args:
        name: A folder, or a Hub id, of an autoencoder (`AutoencoderKL` or `VQModel`) or of a pipeline that has one as
            its ``vae``; or an embedded model.

    Raises:
        ValueError: If there is none, only a pickle of it, or weights of it are missing or damaged.
        OSError: If it can't be had.
    """
    place = folder_of(name)
    if place.is_dir():
        folder = place / "vae" if (place / "vae").is_dir() else place
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no autoencoder: there is no config.json in it.")
        check_part(folder)
        source, inner, said = str(folder), {}, storage.read_json(folder / "config.json").get("_class_name")
    else:
        source, inner, said = name, *_class_on_the_hub(name)
    kinds: dict[Any, Any] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
    if said not in kinds:
        raise ValueError(f"The autoencoder must be one of {', '.join(kinds)}, and {source} holds {said}.")
    vae, found = kinds[said].from_pretrained(
        source, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True, **inner
    )
    missing = list(found["missing_keys"])
    if missing:  # diffusers has drawn random ones
        raise ValueError(
            f"{source} lacks {len(missing)} weights of its {said} ({missing[0]}, ...): fetch it again, whole."
        )
    loaded: Autoencoder = vae.eval().requires_grad_(False)
    return loaded


def _class_on_the_hub(name: str) -> tuple[dict[str, str], Any]:
    """Where in a repository an autoencoder is, as ``from_pretrained`` takes it, and of what class it says it is."""
    try:
        inner = {"subfolder": "vae"}
        config: Any = AutoencoderKL.load_config(name, **inner)
    except OSError:
        inner = {}
        config = AutoencoderKL.load_config(name)
    return inner, config.get("_class_name")
