"""What spoils a picture: bicubic shrinking, blur, noise and block masks, each sample's own by its key.

The random parts of a sample depend on its key alone (`sfumato.randomness`), so pairs of clean and degraded pictures
are the same in any batch, on any process, and in a resumed run. Shrinking is torch's, blurring kornia's; block masks
are drawn here, because libraries draw theirs from a generator for the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sfumato.randomness import Key, randn_for, rng_for
from sfumato.settings import check_ranges, check_types

__all__ = ["TASKS", "Degradation", "Degraded"]

TASKS = {"sr": "super-resolution", "inpaint": "inpainting", "denoise": "denoising", "deblur": "deblurring"}
"""What each task is called in a text."""

NOISE, NOISE_LEVEL, BLUR_LEVEL, BLOCKS = range(1, 5)  # streams of a sample's key; numpy takes 0 for no word
FAINTEST = 0.05  # pixels: a narrower Gaussian has no weight beside the pixel itself


class Degraded(NamedTuple):
    """Degraded pictures.

    Attributes:
        picture: ``(B, 3, h, w)`` in [-1, 1]; holes are -1.
        mask: ``(B, 1, h, w)``, 1 in holes, 0 elsewhere; None if there are none by the task.
    """

    picture: torch.Tensor
    mask: torch.Tensor | None


@dataclass
class Degradation:
    """How pictures are degraded: blurred, then shrunk, then noisy, then cut out, as far as each is asked for.

    Attributes:
        task: ``"sr"`` (super-resolution), ``"inpaint"``, ``"denoise"`` or ``"deblur"``.
        scale: Of super-resolution: how many times smaller the degraded picture is, by antialiased bicubic; None is 4.
        noise: Standard deviation of Gaussian noise, for pictures in [0, 1]; None is 0.1 to denoise, otherwise 0. Of
            inpainting, which puts back what is around the holes, this and `blur` are 0.
        blur: Standard deviation of a Gaussian blur, in pixels of the clean picture; None is 1.5 to deblur, otherwise
            0.
        vary: Draw noise and blur of each sample uniformly between 0 and these.
        blocks: Of inpainting: a mask has from 1 to so many rectangles.
        block_least: Their least side, as a share of the picture's.
        block_most: Their greatest side, likewise.
    """

    task: str = field(default="sr", metadata={"choices": tuple(TASKS)})
    scale: int | None = None
    noise: float | None = None
    blur: float | None = None
    vary: bool = False
    blocks: int = 3
    block_least: float = 0.2
    block_most: float = 0.5

    def __post_init__(self) -> None:
        """Check the settings, and put the task's own in the place of None."""
        check_types(self)
        own = {"scale": 4 if self.task == "sr" else 1, "noise": 0.0, "blur": 0.0}
        own |= {"denoise": {"noise": 0.1}, "deblur": {"blur": 1.5}}.get(self.task, {})
        for name, value in own.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_ranges(self, {"noise": 0, "blur": 0, "blocks": 1})
        if self.task == "sr" and self.factor < 2:
            raise ValueError(f"`scale` of super-resolution must be at least 2, got {self.scale}.")
        if self.task != "sr" and self.factor != 1:
            raise ValueError(
                f"`scale` is for the task sr; {self.task} keeps the size, so leave out scale={self.scale}."
            )
        for task, name in (("denoise", "noise"), ("deblur", "blur")):
            if self.task == task and not getattr(self, name):
                raise ValueError(f"`{name}` must be above 0 for the task {task}, got {getattr(self, name)}.")
            if self.task == "inpaint" and getattr(self, name):
                raise ValueError(
                    f"`{name}` must be 0 for the task inpaint, which puts back what is around the holes as it was "
                    f"given, got {getattr(self, name)}."
                )
        if not 0 < self.block_least <= self.block_most < 1:
            raise ValueError(
                "`block_least` and `block_most` are shares with 0 < block_least <= block_most < 1, got "
                f"{self.block_least} and {self.block_most}."
            )

    @property
    def factor(self) -> int:
        """Size of the clean picture by that of the degraded one."""
        return self.scale or 1

    def check(self, size: int) -> None:
        """Refuse pictures that can't be degraded so.

        Args:
            size: Height and width of the clean pictures.

        Raises:
            ValueError: If the scale does not divide the size, or the blur is too wide for it.
            ImportError: If there is a blur, and kornia is not installed.
        """
        if size % self.factor:
            raise ValueError(f"`scale` {self.factor} does not divide the pictures' size, {size}; change one of them.")
        if size < 2:
            raise ValueError(f"Pictures must be at least 2x2 to be degraded, got {size}x{size}.")
        if self.blur:
            if self._radius >= size:
                raise ValueError(f"A `blur` of {self.blur:g} pixels is too wide for pictures of {size}x{size}.")
            _gaussian_blur()

    def apply(self, pictures: torch.Tensor, keys: Sequence[Key]) -> Degraded:
        """Degrade pictures.

        Args:
            pictures: Clean, ``(B, 3, H, W)`` in [-1, 1].
            keys: One a sample; what is random in it depends on this alone.

        Returns:
            Pictures ``(B, 3, H / scale, W / scale)``, clipped to [-1, 1], on the same device; with masks where the
            task is to inpaint.

        Raises:
            ValueError: As `check`, of height and width.
        """
        height, width = pictures.shape[-2:]
        for size in {height, width}:
            self.check(size)
        spoiled = pictures
        if self.blur:
            levels = self._levels(self.blur, keys, BLUR_LEVEL).clamp(min=FAINTEST)
            spoiled = _gaussian_blur()(spoiled, 2 * self._radius + 1, levels.to(pictures).expand(-1, 2))
        if self.factor > 1:
            small = height // self.factor, width // self.factor
            spoiled = F.interpolate(spoiled, small, mode="bicubic", align_corners=False, antialias=True)
        if self.noise:
            levels = 2 * self._levels(self.noise, keys, NOISE_LEVEL)[:, :, None, None]  # [-1, 1] is twice as wide
            noise = levels * randn_for([(*key, NOISE) for key in keys], spoiled.shape[1:])
            spoiled = spoiled + noise.to(spoiled)
        spoiled = spoiled.clamp(-1, 1)
        if self.task != "inpaint":
            return Degraded(spoiled, None)
        mask = torch.stack([self._mask(height, width, key) for key in keys]).to(spoiled)
        return Degraded(torch.where(mask > 0, -1.0, spoiled), mask)

    @property
    def _radius(self) -> int:
        """Of the blur's kernel: three standard deviations."""
        return max(1, math.ceil(3 * (self.blur or 0)))

    def _levels(self, most: float, keys: Sequence[Key], stream: int) -> torch.Tensor:
        """Strength for each sample, (B, 1)."""
        shares = [rng_for(*key, stream).random() if self.vary else 1.0 for key in keys]
        return most * torch.tensor(shares).unsqueeze(1)

    def _mask(self, height: int, width: int, key: Key) -> torch.Tensor:
        """Rectangles, (1, H, W): some of the picture is always cut out, and some always left."""
        rng, mask = rng_for(*key, BLOCKS), torch.zeros(1, height, width)
        for _ in range(rng.integers(1, self.blocks + 1)):
            spans = []
            for length in (height, width):
                side = min(max(1, round(rng.uniform(self.block_least, self.block_most) * length)), length - 1)
                start = int(rng.integers(length - side + 1))
                spans.append(slice(start, start + side))
            larger = mask.clone()
            larger[:, spans[0], spans[1]] = 1
            if bool(larger.all()):
                break
            mask = larger
        return mask


def _gaussian_blur() -> Any:
    try:
        from kornia.filters import gaussian_blur2d
    except ImportError as error:
        raise ImportError("`blur` needs kornia: run pip install 'sfumato[train]'.") from error
    return gaussian_blur2d
