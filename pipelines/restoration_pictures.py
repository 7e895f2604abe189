"""Pictures into and out of the restoration pipelines: every mode of PIL, arrays and tensors; grey stays grey.

Values are [0, 1] here. What a network of three channels does not know is kept apart and put back: that a picture is
grey, that it had 16 bits, and its transparency.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

__all__ = ["Picture", "check_output_type", "finish_picture", "join_pictures", "read_masks", "read_pictures"]

OUTPUT_TYPES = ("pil", "np", "pt")
_SLACK = 1e-3
"""How far values may leave [0, 1]: resizing and rounding do that."""


@dataclass(frozen=True)
class Picture:
    """A picture as a network gets it.

    Attributes:
        pixels: ``(3, h, w)`` in [0, 1], float32.
        grey: Whether it had one channel of colour.
        alpha: Its transparency ``(1, h, w)`` in [0, 1]; None without.
        deep: Whether it was a PIL image of 16 bits (which are all grey), and so shall be the result.
    """

    pixels: Tensor
    grey: bool = False
    alpha: Tensor | None = None
    deep: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[-2], self.pixels.shape[-1]


def check_output_type(output_type: str) -> None:
    """Raise a ValueError for a form of results that there is not."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be 'pil', 'np' or 'pt', got {output_type!r}.")


def read_pictures(image: Any) -> list[Picture]:
    """Read pictures.

    Args:
        image: PIL image of any mode (its EXIF orientation is applied); array ``(h, w)``, ``(h, w, C)`` or
            ``(B, h, w, C)``; tensor ``(h, w)``, ``(C, h, w)`` or ``(B, C, h, w)``; or a list of such, of any sizes. C
            is 1 or 3, one more with transparency. Bytes are divided by 255, 16-bit integers by 65535, floats must lie
            in [0, 1].

    Returns:
        The pictures.

    Raises:
        ValueError: If one is empty, can't be decoded, or is of another kind, shape or range.
    """
    return [_picture(values, deep) for values, deep in _all_values(image, "image")]


def read_masks(mask_image: Any, pictures: Sequence[Picture]) -> list[Tensor]:
    """Read masks.

    Args:
        mask_image: As `read_pictures` takes them; white, from one half on, is to be filled, and what is transparent is
            black. One serves all pictures.
        pictures: What they belong to.

    Returns:
        ``(1, h, w)`` each, True in holes.

    Raises:
        ValueError: If number or size differ from the pictures', or one marks nothing.
    """
    masks = [_picture(values) for values, _ in _all_values(mask_image, "mask_image")]
    if len(masks) not in (1, len(pictures)):
        raise ValueError(f"`mask_image` must be one or {len(pictures)}, one a picture, got {len(masks)}.")
    masks = masks * len(pictures) if len(masks) == 1 else masks
    holes = []
    for mask, picture in zip(masks, pictures, strict=True):
        if mask.size != picture.size:
            raise ValueError(
                f"`mask_image` must have the picture's size: its height and width are {mask.size}, the picture's"
                f" {picture.size}."
            )
        white = mask.pixels.mean(dim=0, keepdim=True)
        hole = (white if mask.alpha is None else white * mask.alpha) >= 0.5
        if not bool(hole.any()):
            raise ValueError("`mask_image` marks nothing: paint white what is to be filled.")
        holes.append(hole)
    return holes


def finish_picture(picture: Picture, restored: Tensor, hole: Tensor | None, scale: int) -> Tensor:
    """Give a restored picture what its original had: grey, transparency, and, outside holes, its pixels to the bit.

    Args:
        picture: The original.
        restored: ``(3, H, W)`` in [0, 1].
        hole: ``(1, h, w)``, True where the result is taken; None takes all of it.
        scale: Size of the result over that of the original.

    Returns:
        ``(C, H, W)`` in [0, 1]; C is 1 or 3, one more with transparency (resized, bicubic).
    """
    original = picture.pixels
    if picture.grey:
        restored, original = restored.mean(dim=0, keepdim=True), original[:1]
    if hole is not None:
        restored = torch.where(hole, restored, original)
    if picture.alpha is None:
        return restored
    alpha = picture.alpha
    if scale != 1:
        size = restored.shape[-2:]
        alpha = F.interpolate(alpha[None], size=size, mode="bicubic", align_corners=False)[0].clamp(0, 1)
    return torch.cat([restored, alpha])


def join_pictures(pictures: Sequence[Tensor], output_type: str, originals: Sequence[Picture] = ()) -> Any:
    """Give results the form that a call asked for.

    Args:
        pictures: ``(C, H, W)`` in [0, 1] each.
        output_type: ``"pil"``, ``"np"`` or ``"pt"``.
        originals: What they were made of, if of anything.

    Returns:
        PIL images of 8 bits (modes L, LA, RGB, RGBA), or of 16 (mode I;16) where the original was one; an array
        ``(B, H, W, C)`` or a tensor ``(B, C, H, W)``, or, if shapes differ, a list of one for each picture.
    """
    if output_type == "pil":
        deep = [original.deep for original in originals] or [False] * len(pictures)
        return [_pil(picture, own) for picture, own in zip(pictures, deep, strict=True)]
    alike = len({picture.shape for picture in pictures}) == 1
    if output_type == "pt":
        return torch.stack(list(pictures)) if alike else list(pictures)
    arrays = [picture.permute(1, 2, 0).numpy() for picture in pictures]
    return np.stack(arrays) if alike else arrays


def _pil(picture: Tensor, deep: bool) -> Image.Image:
    if deep:
        return Image.fromarray((picture[0] * 65535).round().numpy().astype(np.uint16))
    mode = ("L", "LA", "RGB", "RGBA")[len(picture) - 1]
    values = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(values[..., 0] if mode == "L" else values, mode=mode)


# ------------------------------------------------------------ reading


def _all_values(image: Any, name: str) -> list[tuple[Tensor, bool]]:
    """The values `(C, h, w)` in [0, 1] of each picture, and whether it is a PIL image of 16 bits."""
    entries = list(image) if isinstance(image, list | tuple) else [image]
    found = []
    for index, entry in enumerate(entries):
        where = f"`{name}`" if len(entries) == 1 else f"Picture {index} of `{name}`"
        if isinstance(entry, Image.Image):
            parts = [_from_pil(entry, where)]
        elif isinstance(entry, np.ndarray):
            parts = [_from_array(part, where) for part in (entry if entry.ndim == 4 else [entry])]
        elif isinstance(entry, Tensor):
            parts = [_from_tensor(part, where) for part in (entry if entry.ndim == 4 else [entry])]
        else:
            raise ValueError(f"{where} must be a PIL image, an array or a tensor, got {type(entry).__name__}.")
        deep = isinstance(entry, Image.Image) and entry.mode.startswith("I")
        found += [(_checked(part, where), deep) for part in parts]
    if not found:
        raise ValueError(f"`{name}` holds no picture.")
    return found


def _picture(values: Tensor, deep: bool = False) -> Picture:
    """Split the values `(C, h, w)` into colour, grey or not, and transparency."""
    channels = len(values)
    colour, alpha = (values[:-1], values[-1:]) if channels in (2, 4) else (values, None)
    return Picture(colour.expand(3, -1, -1).contiguous(), grey=len(colour) == 1, alpha=alpha, deep=deep)


def _checked(values: Tensor, where: str) -> Tensor:
    if values.ndim != 3 or len(values) not in (1, 2, 3, 4) or values.numel() == 0:
        raise ValueError(
            f"{where} must be a picture of 1 or 3 channels, one more with transparency, got the shape"
            f" {tuple(values.shape)} (channels, height, width)."
        )
    low, high = float(values.min()), float(values.max())
    if not (low >= -_SLACK and high <= 1 + _SLACK):  # not a number either
        raise ValueError(
            f"{where} must have values in [0, 1] (or be bytes or 16-bit integers), got {low:g} to {high:g}: scale or"
            " clip it."
        )
    return values.clamp(0, 1)


def _from_pil(image: Image.Image, where: str) -> Tensor:
    if 0 in image.size:
        raise ValueError(f"{where} is empty: its width and height are {image.size}.")
    try:
        image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for broken data
        raise ValueError(f"{where} can't be read as a picture ({error}).") from error
    if image.mode.startswith("I;16"):
        return _from_array(np.asarray(image).astype(np.uint16), where)
    if image.mode == "I":  # how some formats hold 16 bits
        return torch.from_numpy(np.asarray(image).astype(np.float32) / 65535)[None]
    if image.mode == "F":
        return torch.from_numpy(np.array(image, dtype=np.float32))[None]
    colour = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    return _from_array(np.asarray(image.convert(colour + "A" * image.has_transparency_data)), where)


def _from_array(array: np.ndarray, where: str) -> Tensor:
    """Values `(C, h, w)` of an array `(h, w)` or `(h, w, C)`."""
    if array.dtype.kind not in "buif" or array.dtype.itemsize > 8:  # torch has no longer floats
        raise ValueError(f"{where} must hold floats in [0, 1], bytes or 16-bit integers, got {array.dtype}.")
    own = np.array(array, dtype=array.dtype.newbyteorder("="))  # torch wants this machine's order, and no read-only
    return _from_tensor(torch.from_numpy(own[..., None] if own.ndim == 2 else own), where, last=True)


def _from_tensor(values: Tensor, where: str, last: bool = False) -> Tensor:
    """Values `(C, h, w)` of a tensor `(h, w)`, `(C, h, w)` or, with channels `last`, `(h, w, C)`."""
    values = values.detach().cpu()
    limits = {torch.uint8: 255, torch.uint16: 65535, torch.bool: 1}
    if not values.is_floating_point() and values.dtype not in limits:
        raise ValueError(f"{where} must hold floats in [0, 1], bytes or 16-bit integers, got {values.dtype}.")
    values = values.to(torch.float32) / limits.get(values.dtype, 1)
    if values.ndim == 2:
        return values[None]
    return values.permute(2, 0, 1) if last and values.ndim == 3 else values
