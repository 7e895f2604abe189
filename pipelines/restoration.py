"""What the restoration pipelines share: how a network sees a degraded picture, any size, tiles; the base of both.

A restoration network is a ``UNet2DModel`` that is given the chain's state beside the degraded picture, in channels.
The functions here say how; training calls the same ones, so that a network is trained on what it later sees. The chain
runs in pixels, at the size of the result, or in the latents of an autoencoder:

    y = degraded picture, resized to the result's size, encoded           `degraded_start`, `encode_pixels`
    input = space_to_depth(concat(state, condition), patch_size)          `condition_on_grid`, `network_input`
    heads = depth_to_space(network(input, time), patch_size)              `network_output`

Pictures of any size are padded by reflection at the right and the bottom, and the result is cropped. Large ones are
tiled: at each step the network is called on overlapping tiles, its outputs are blended by smooth weights that sum to
one, and one step is taken with the whole picture. (ResShift's released program restores each tile by a run of its own,
with noise of its own, and averages the results, which leaves seams where the runs disagree.)
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, VQModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .restoration_chain import TRAINED_WITH, Chain, raise_other
from .restoration_pictures import Picture, finish_picture, read_masks
from .restoration_tiles import Tiles, Tiling

__all__ = [
    "RestorationPipeline", "condition_channels", "condition_on_grid", "decode_latents", "degraded_start",
    "encode_pixels", "network_input", "network_output", "pad_to_multiple",
]  # fmt: skip

Generators = torch.Generator | list[torch.Generator] | None


def degraded_start(lq: Tensor, scale: int) -> Tensor:
    """Resize a degraded picture to the size of the result: where the chain starts.

    Args:
        lq: Degraded pictures ``(B, C, h, w)``.
        scale: Size of the result over that of the picture.

    Returns:
        ``(B, C, scale * h, scale * w)``, bicubic without antialiasing, as in ResShift's program; not clamped.
    """
    if scale == 1:
        return lq
    size = (scale * lq.shape[-2], scale * lq.shape[-1])
    return F.interpolate(lq, size=size, mode="bicubic", align_corners=False)


def condition_on_grid(lq: Tensor, mask: Tensor | None, size: Sequence[int]) -> Tensor:
    """Bring what the network is told, the degraded picture and the mask, to the grid of the chain.

    A larger picture is folded into channels, so that nothing of it is lost (inpainting in latents); an equal one stays
    (x4 with an autoencoder that shrinks by 4); a smaller one is resized, bicubic (super-resolution in pixels).

    Args:
        lq: Degraded pictures ``(B, 3, h, w)`` in [-1, 1].
        mask: ``(B, 1, h, w)``, 1 in holes and -1 elsewhere; None for a network without one.
        size: Height and width of the chain.

    Returns:
        ``(B, K, *size)``.

    Raises:
        ValueError: If the picture is larger by no whole factor, or mask and picture differ in size.
    """
    if mask is not None and mask.shape[-2:] != lq.shape[-2:]:
        raise ValueError(f"Mask and picture differ in size: {tuple(mask.shape[-2:])}, {tuple(lq.shape[-2:])}.")
    condition = lq if mask is None else torch.cat([lq, mask.to(lq)], dim=1)
    height, width = size
    if condition.shape[-2] <= height and condition.shape[-1] <= width:
        if condition.shape[-2:] == (height, width):
            return condition
        return F.interpolate(condition, size=(height, width), mode="bicubic", align_corners=False)
    factor = condition.shape[-2] // height
    if condition.shape[-2:] != (factor * height, factor * width):
        raise ValueError(
            f"A picture of {tuple(condition.shape[-2:])} must be larger than the chain's grid, {(height, width)}, by a"
            " whole factor, or not at all."
        )
    return F.pixel_unshuffle(condition, factor)


def condition_channels(scale: int, shrink: int, masked: bool) -> int:
    """Count the channels K that `condition_on_grid` gives.

    Args:
        scale: Size of the result over that of the picture.
        shrink: How much the autoencoder shrinks a side; 1 without one.
        masked: Whether the network is given a mask.

    Raises:
        ValueError: If the picture is larger than the chain's grid by no whole factor.
    """
    if shrink > scale and shrink % scale:
        raise ValueError(
            f"`scale` {scale} must divide what the autoencoder shrinks a side by, {shrink}, or be at least that."
        )
    return (3 + masked) * max(1, shrink // scale) ** 2


def network_input(sample: Tensor, condition: Tensor | None, patch_size: int) -> Tensor:
    """What a restoration network is given.

    Args:
        sample: State of the chain ``(B, C, h, w)``, scaled by the scheduler.
        condition: ``(B, K, h, w)``, see `condition_on_grid`; None for a network that sees the state alone.
        patch_size: p; blocks of p x p are folded into channels, for a cheaper network on a chain that stays the same.

    Returns:
        ``(B, (C + K) * p^2, h / p, w / p)``.
    """
    joined = sample if condition is None else torch.cat([sample, condition.to(sample)], dim=1)
    return F.pixel_unshuffle(joined, patch_size)


def network_output(output: Tensor, patch_size: int) -> Tensor:
    """Undo the folding of `network_input` in what a network puts out.

    Args:
        output: ``(B, heads * C * p^2, h / p, w / p)``.
        patch_size: p.

    Returns:
        ``(B, heads * C, h, w)``, one head after the other.
    """
    return F.pixel_shuffle(output, patch_size)


def encode_pixels(vae: AutoencoderKL | VQModel | None, pixels: Tensor) -> Tensor:
    """Bring pictures to where the chain runs.

    Args:
        vae: The autoencoder; None if that is the pixels themselves.
        pixels: ``(B, 3, H, W)`` in [-1, 1].

    Returns:
        The posterior's mode or, of a `VQModel`, what it encodes before quantisation, times the autoencoder's
        ``scaling_factor`` (1 in ResShift's releases), float32.
    """
    if vae is None:
        return pixels
    with _wide(vae) as dtype:
        encoded = vae.encode(pixels.to(dtype))
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return latents.float() * vae.config.scaling_factor


def decode_latents(vae: AutoencoderKL | VQModel | None, latents: Tensor) -> Tensor:
    """Undo `encode_pixels`; a `VQModel` quantises first."""
    if vae is None:
        return latents
    with _wide(vae) as dtype:
        return vae.decode((latents / vae.config.scaling_factor).to(dtype), return_dict=False)[0].float()


@contextmanager
def _wide(vae: AutoencoderKL | VQModel) -> Iterator[torch.dtype]:
    """What an autoencoder computes in meanwhile: some overflow in half precision and say so in their config."""
    upcast = vae.dtype == torch.float16 and vae.config.force_upcast
    try:
        if upcast:
            vae.to(dtype=torch.float32)
        yield vae.dtype
    finally:
        if upcast:
            vae.to(dtype=torch.float16)


def pad_to_multiple(pixels: Tensor, multiple: int) -> Tensor:
    """Pad pictures at the right and the bottom, by reflection, or by the last pixels where there are too few.

    Args:
        pixels: ``(B, C, h, w)``.
        multiple: What both sides must be whole multiples of.

    Returns:
        The padded pictures; the same if nothing is missing.
    """
    for axis, border in ((-1, "right"), (-2, "bottom")):
        missing = -pixels.shape[axis] % multiple
        if missing:
            mode = "reflect" if missing < pixels.shape[axis] else "replicate"
            pixels = F.pad(pixels, (0, missing, 0, 0) if border == "right" else (0, 0, 0, missing), mode=mode)
    return pixels


def _home() -> str:
    """The package that this file is installed in; empty if it came with a model, as the scheduler's did then."""
    home, found, _ = __name__.partition(".pipelines.")
    return home if found else ""


def _ship_code(kind: type, folder: Path) -> list[str]:
    """Copy the file of a class, and those beside it that it imports, into a folder; gives the entry for an index."""
    folder.mkdir(exist_ok=True)
    file = Path(inspect.getfile(kind))
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    beside = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level}
    for name in (file.stem, *sorted(filter(None, beside))):
        shutil.copyfile(file.with_name(f"{name}.py"), folder / f"{name}.py")
    return [file.stem, kind.__name__]


class RestorationPipeline(DiffusionPipeline, ABC):
    """Base of the pipelines that restore pictures with a ``UNet2DModel``.

    Args:
        unet: The network; see `network_input` for what it is given.
        scheduler: The sampler it was trained with.
        vae: The autoencoder in whose latents the chain runs; None for a chain of pixels.
        scale: Size of the result over that of the picture: 4 for x4 super-resolution, 1 where the size stays.
        patch_size: Blocks of this side are folded into channels for the network.
        masked: Whether the network fills holes, and is given a mask of them beside the picture.
        conditioned: Whether the network is given the degraded picture (and mask); otherwise the chain's state alone.
        prediction_type: Of the scheduler that the network was trained with, which is kept in the pipeline's folder;
            None takes that of `scheduler`, others are refused.
        num_train_timesteps: Likewise.
        chain: Likewise, what else of that scheduler's config the network is bound to, by name.

    Raises:
        ValueError: If network, scheduler and settings do not fit together.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]
    _sampler = ""
    """Name of the scheduler's class. (Not the class: one that is loaded from the Hub is another object.)"""
    _default_steps: int | None = None
    """Steps of a call that does not say how many; None for all times of the scheduler."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in `DiffusionPipeline`, which finds a scheduler of this package only if that has been imported."""
        if home := _home():
            import_module(f"{home}.schedulers.{cls._sampler_file()}")
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As in `ConfigMixin`; a folder that ships the code of these classes is read with the installed ones."""
        found = super().load_config(*args, **kwargs)
        index = found[0] if isinstance(found, tuple) else found
        home, named, scheduler = _home(), index.get("_class_name"), index.get("scheduler")
        ours = (named[-1] if isinstance(named, list) else named) == cls.__name__ and isinstance(scheduler, list)
        if home and ours and (scheduler[0].rpartition(".")[2], scheduler[-1]) == (cls._sampler_file(), cls._sampler):
            index["_class_name"] = cls.__name__  # the module may have been that of a model that came with its code
            index["scheduler"] = [f"{home}.schedulers.{cls._sampler_file()}", cls._sampler]
        return found

    def save_config(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in `ConfigMixin`; classes that came with a model, and are installed nowhere, are saved with it again."""
        super().save_config(save_directory, *args, **kwargs)
        if _home():
            return
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
        index["_class_name"] = _ship_code(type(self), folder)
        if type(self.scheduler).__name__ == self._sampler:
            index["scheduler"] = _ship_code(type(self.scheduler), folder / "scheduler")
        (folder / self.config_name).write_text(json.dumps(index, indent=2), encoding="utf-8")

    @classmethod
    def _sampler_file(cls) -> str:
        return f"scheduling_{cls._sampler.removesuffix('Scheduler').lower()}"

    @abstractmethod
    def _sample(
        self, degraded: Tensor | None, noise: Tensor, predict: Any, generator: Generators, bar: Any, **settings: Any
    ) -> Tensor:
        """Run the chain from noise ``(B, C, h, w)`` to its end; ``predict(state, t)`` calls the network."""

    @abstractmethod
    def _chain(self) -> Chain:
        """What of the scheduler the networks are bound to."""

    @abstractmethod
    def _networks(self) -> dict[str, int]:
        """The networks by name, with the number of heads that each has."""

    def _network(self, model_input: Tensor, timestep: Tensor) -> Tensor:
        """Call the network, or networks, on what `network_input` gave."""
        return self.unet(model_input.to(self.unet.dtype), timestep, return_dict=False)[0].float()

    # ------------------------------------------------------------ what fits together

    @property
    def shrink(self) -> int:
        """How much the autoencoder shrinks a side; 1 without one."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """Channels C of the chain: those of the latents, or 3."""
        if self.vae is None:
            return 3
        config = self.vae.config  # a VQModel may quantise in fewer dimensions
        return getattr(config, "vq_embed_dim", None) or config.latent_channels

    @property
    def multiple(self) -> int:
        """What both sides of a result are padded to whole multiples of, in pixels."""
        levels = max(len(getattr(self, name).config.down_block_types) for name in self._networks())
        return self.shrink * self.config.patch_size * 2 ** (levels - 1)

    def latents_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape ``(C, h, w)`` of the initial noise for a picture.

        Args:
            height: Of the picture that is given (for generation, of the one that is drawn), in pixels.
            width: Likewise.
        """
        scale, multiple = self.config.scale, self.multiple
        whole = math.lcm(scale, multiple)
        sides = (-(-side * scale // whole) * whole // self.shrink for side in (height, width))
        return (self.channels, *sides)

    def check_settings(
        self, num_inference_steps: int | None = None, tile_size: int | None = None, tile_overlap: int | None = None,
        tile_batch_size: int = 16,
    ) -> int:  # fmt: skip
        """Check what a call says beside its pictures, before there are any; a call checks the same.

        Args:
            num_inference_steps: As in a call; None for what it takes then.
            tile_size: As in a call.
            tile_overlap: As in a call.
            tile_batch_size: As in a call.

        Returns:
            The number of steps; the scheduler is set to them.

        Raises:
            ValueError: If one is out of range, or networks and scheduler do not fit together.
        """
        self._check_components()
        self._tile_sides(Tiling(tile_size, tile_overlap, tile_batch_size))
        self.scheduler.set_timesteps(self._default_steps if num_inference_steps is None else num_inference_steps)
        return len(self.scheduler.timesteps)

    def _register(self, chain: dict[str, Any] | None, **settings: Any) -> None:
        """Note settings, and what the network was trained with, in the config; see that all fits together."""
        own = getattr(self.scheduler, "config", {})
        known = {name: own.get(name) if settings[name] is None else settings[name] for name in TRAINED_WITH}
        self.register_to_config(**{**settings, **known}, chain=self._chain().of(self.scheduler, chain))
        self._check_components()

    def _check_components(self) -> None:
        """Raise a ValueError if networks, scheduler and settings do not fit together."""
        scale, patch, masked = self.config.scale, self.config.patch_size, self.config.masked
        for name, value in (("scale", scale), ("patch_size", patch)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number from 1 on, got {value!r}.")
        if masked and scale != 1:
            raise ValueError(f"A model that fills holes keeps the picture's size: `scale` must be 1, got {scale}.")
        if self._sampler not in {kind.__name__ for kind in type(self.scheduler).__mro__}:
            raise ValueError(
                f"{type(self).__name__} steps with a {self._sampler}, this one has a {type(self.scheduler).__name__}:"
                " a restoration network works with the sampler that it was trained for alone."
            )
        for name in TRAINED_WITH:
            if self.config[name] != self.scheduler.config[name]:
                raise_other(name, self.config[name], self.scheduler.config[name])
        self._chain().check(self.scheduler, self.config.chain)
        told = condition_channels(scale, self.shrink, masked) if self.config.conditioned else 0
        for name, heads in self._networks().items():
            config = getattr(self, name).config
            needed = (self.channels + told) * patch**2, heads * self.channels * patch**2
            if (config.in_channels, config.out_channels) != needed:
                raise ValueError(
                    f"`{name}` takes {config.in_channels} channels and puts out {config.out_channels}, but must take"
                    f" {needed[0]}, ({self.channels} of the chain + {told} of the condition) * patch_size^2, and"
                    f" put out {needed[1]}, {heads} * {self.channels} * patch_size^2, for the scheduler's"
                    f" prediction_type {self.scheduler.config.prediction_type!r}."
                )

    def _read_masks(self, mask_image: Any, pictures: Sequence[Picture]) -> list[Tensor] | None:
        """The holes of each picture, for a network that fills them; raises a ValueError for a mask too many or few."""
        if self.config.masked and mask_image is None:
            raise ValueError("This model fills holes: pass `mask_image`, white where the picture is to be filled.")
        if mask_image is None:
            return None
        if not self.config.masked:
            raise ValueError("This model is not given masks (its setting `masked` is False): drop `mask_image`.")
        return read_masks(mask_image, pictures)

    # ------------------------------------------------------------ a run

    def _restore(
        self,
        pictures: Sequence[Picture],
        masks: Sequence[Tensor] | None,
        generator: Generators,
        latents: Tensor | None,
        tiling: Tiling,
        num_inference_steps: int | None,
        sweeps: int = 1,
        **settings: Any,
    ) -> list[Tensor]:
        """Restore pictures of any sizes, those of one size together; each comes back as `finish_picture` says."""
        self._check_components()
        self.scheduler.set_timesteps(num_inference_steps)  # says what is wrong with the number before any work
        groups: dict[tuple[int, int], list[int]] = {}
        for index, picture in enumerate(pictures):
            groups.setdefault(picture.size, []).append(index)
        self._check_noise(groups, len(pictures), generator, latents)
        tiles = {size: self._tiles(self.latents_shape(*size), tiling) for size in groups}
        results: dict[int, Tensor] = {}
        with self.progress_bar(total=len(groups) * sweeps * len(self.scheduler.timesteps)) as bar:
            for size, members in groups.items():
                lq = torch.stack([pictures[index].pixels for index in members]) * 2 - 1
                holes = None if masks is None else torch.stack([masks[index] for index in members])
                own = [generator[index] for index in members] if isinstance(generator, list) else generator
                device = self._execution_device
                noise = self._noise((len(members), *self.latents_shape(*size)), latents, own, device)
                self.scheduler.set_timesteps(num_inference_steps, device=device)
                restored = self._restore_group(lq.to(device), holes, noise, own, tiles[size], bar, settings).cpu()
                for index, pixels in zip(members, restored, strict=True):
                    hole = None if masks is None else masks[index]
                    results[index] = finish_picture(pictures[index], pixels, hole, self.config.scale)
        self.maybe_free_model_hooks()
        return [results[index] for index in range(len(pictures))]

    def _restore_group(
        self, lq: Tensor, holes: Tensor | None, noise: Tensor, generator: Generators, tiles: Tiles, bar: Any,
        settings: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """Restore pictures ``(B, 3, h, w)`` in [-1, 1] of one size; gives ``(B, 3, H, W)`` in [0, 1]."""
        scale = self.config.scale
        height, width = lq.shape[-2] * scale, lq.shape[-1] * scale
        mask = None
        if holes is not None:
            lq = lq.masked_fill(holes.to(lq.device), -1)
            mask = holes.to(lq) * 2 - 1  # (B, 1, h, w), 1 in holes
        multiple = math.lcm(scale, self.multiple) // scale
        lq = pad_to_multiple(lq, multiple)
        mask = None if mask is None else pad_to_multiple(mask, multiple)
        degraded = encode_pixels(self.vae, degraded_start(lq, scale))  # (B, C, h', w')
        condition = condition_on_grid(lq, mask, degraded.shape[-2:]) if self.config.conditioned else None
        predict = self._predictor(condition, tiles)
        state = self._sample(degraded, noise, predict, generator, bar, **settings)
        return self._finished(state, height, width)

    def _finished(self, state: Tensor, height: int, width: int) -> Tensor:
        """Give the pictures ``(B, 3, H, W)`` in [0, 1] at the chain's end; not a number would become black."""
        pixels = decode_latents(self.vae, state)[..., :height, :width]
        if not bool(pixels.isfinite().all()):
            raise ValueError("The result has values that are not finite: check the weights, or run it in float32.")
        return (pixels / 2 + 0.5).clamp(0, 1)

    def _predictor(self, condition: Tensor | None, tiles: Tiles) -> Callable[[Tensor, Tensor], Tensor]:
        """Give the function ``predict(state, t)``, whose heads ``(B, heads * C, h, w)`` are float32."""
        patch = self.config.patch_size

        def predict(state: Tensor, timestep: Tensor) -> Tensor:
            def call(sample: Tensor, told: Tensor | None) -> Tensor:
                return network_output(self._network(network_input(sample, told, patch), timestep), patch)

            return tiles.blend(call, self.scheduler.scale_model_input(state, timestep), condition)

        return predict

    def _tiles(self, shape: tuple[int, int, int], tiling: Tiling) -> Tiles:
        """Lay tiles over the grid of a chain ``(C, h, w)``."""
        size, overlap = self._tile_sides(tiling)
        side = size // self.shrink or max(shape[1:])
        return Tiles.over(shape[1:], side, -(-overlap // self.shrink), self.multiple // self.shrink, tiling.batch_size)

    def _tile_sides(self, tiling: Tiling) -> tuple[int, int]:
        """Side of tiles, as the call says, or else that of training, and their overlap; see `Tiling.sides`."""
        trained = self.unet.config.sample_size or 0
        trained = max(trained) if isinstance(trained, list | tuple) else trained
        return tiling.sides(trained * self.config.patch_size * self.shrink, self.multiple)

    def _check_noise(
        self, groups: dict[tuple[int, int], list[int]], count: int, generator: Generators, latents: Tensor | None
    ) -> None:
        """Raise a ValueError for generators or noise that do not fit the pictures."""
        for one in generator if isinstance(generator, list) else [generator]:
            if not isinstance(one, torch.Generator | None):
                raise ValueError(f"`generator` must be a torch.Generator or a list of such, got {one!r}.")
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"`generator` must be one or a list of {count}, one a picture, got {len(generator)}.")
        if latents is None:
            return
        shapes = {self.latents_shape(*size) for size in groups}
        if len(shapes) > 1:
            raise ValueError(f"`latents` fits pictures of one size, got {len(groups)} sizes: call for each of them.")
        shape = next(iter(shapes))
        if latents.ndim != 4 or tuple(latents.shape[1:]) != shape or len(latents) not in (1, count):
            raise ValueError(
                f"`latents` must have the shape {(count, *shape)}, or {(1, *shape)} for the same noise in each, got"
                f" {tuple(latents.shape)}."
            )

    def _noise(self, shape: Sequence[int], latents: Tensor | None, generator: Generators, device: Any) -> Tensor:
        """Initial noise of a group, float32 whatever the network's precision, given or drawn."""
        if latents is None:
            return randn_tensor(tuple(shape), generator=generator, device=device, dtype=torch.float32)
        return latents.to(device, torch.float32).expand(*shape)
