"""Captioned pictures of a model's kind: the renders of Fashion-MNIST that atelier learned from, or a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from sfumato import atelier
from sfumato.families import Family, TextFamily
from sfumato.randomness import rng_for
from sfumato.unlearning.examples import ImageFolder

__all__ = ["ATELIER", "Captioned", "FolderPictures", "Garments", "Renders", "pictures_for"]

ATELIER = "atelier"
LOOKS, WORDS = 811, 812  # keys that keep the random streams apart


class Captioned(Protocol):
    """Pictures, each with what it shows."""

    captions: list[str]
    """A prompt for each; of a class-conditional model the name of its class."""

    def take(self, positions: range) -> torch.Tensor:
        """Give some, ``(B, C, H, W)`` in [0, 1], float32, on the CPU."""
        ...

    def facts(self) -> dict[str, Any]:
        """Say what tells the pictures from others, as JSON can hold it."""
        ...


class Renders:
    """A render of each garment of Fashion-MNIST, 32x32, in a style and a colour, captioned as atelier's were.

    Args:
        data_dir: As for `sfumato.atelier.find_fashion_mnist`.
        count: Take the first of the garments only; None takes all.
        seed: Chooses style, colour and caption of each.

    Raises:
        FileNotFoundError: If the data is not found.
    """

    def __init__(self, data_dir: str | Path | None, count: int | None, seed: int) -> None:
        images, labels = (torch.from_numpy(part)[:count] for part in atelier.find_fashion_mnist(data_dir))
        looks = torch.from_numpy(
            rng_for(seed, LOOKS).integers(len(atelier.STYLES) * len(atelier.COLOURS), size=len(images))
        )
        self._images, self._seed = images, seed
        self._styles, self._colours = looks % len(atelier.STYLES), looks // len(atelier.STYLES)
        words, shown = rng_for(seed, WORDS), zip(labels, self._styles, self._colours, strict=True)
        self.captions = [atelier.random_caption(int(g), int(s), int(c), words) for g, s, c in shown]

    def take(self, positions: range) -> torch.Tensor:
        """See `Captioned`."""
        some = slice(positions.start, positions.stop)
        return atelier.render(self._images[some], self._styles[some], self._colours[some])

    def facts(self) -> dict[str, Any]:
        """See `Captioned`."""
        return {
            "source": "renders",
            "seed": self._seed,
            "pictures": len(self.captions),
            "digest": _digest(self._images),
        }


class Garments:
    """The garments of Fashion-MNIST, grey, 16x16, each with its class.

    Args:
        names: Of the model's classes.
        data_dir: As for `Renders`.
        count: Likewise.
    """

    def __init__(self, names: Sequence[str], data_dir: str | Path | None, count: int | None) -> None:
        images, labels = atelier.find_fashion_mnist(data_dir)
        self._images = (atelier.small_garments(images[:count]) / 2 + 0.5).clamp(0, 1)
        self.captions = [names[label] for label in labels[:count]]

    def take(self, positions: range) -> torch.Tensor:
        """See `Captioned`."""
        return self._images[positions.start : positions.stop]

    def facts(self) -> dict[str, Any]:
        """See `Captioned`."""
        return {"source": "garments", "pictures": len(self.captions), "digest": _digest(self._images)}


class FolderPictures(ImageFolder):
    """The pictures of a folder, with the captions of its ``metadata.jsonl``, resized and cropped for a family."""

    def facts(self) -> dict[str, Any]:
        """See `Captioned`; the folder may lie elsewhere when a run is resumed."""
        return {"source": "folder", "pictures": len(self), "digest": self.digest()}


def pictures_for(family: Family, data: str, data_dir: str | None, count: int | None, seed: int) -> Captioned:
    """Find pictures for a model.

    Args:
        family: The model's.
        data: `ATELIER`, or a folder.
        data_dir: As for `Renders`.
        count: Likewise; only of `ATELIER`.
        seed: Likewise.

    Raises:
        ValueError: If the pictures are of another size or kind than the model's, or ``metadata.jsonl`` is malformed.
        FileNotFoundError: If there are none.
    """
    if data != ATELIER:
        if count is not None:
            raise ValueError(f"`pictures` counts renders of {ATELIER}: of the folder {data}, all are taken.")
        found = FolderPictures(data, family)
        if family.class_names is not None:
            family.encode_prompts(list(dict.fromkeys(found.captions)))  # says what is no class
        return found
    names, size = family.class_names or [], tuple(family.image_size)
    if isinstance(family, TextFamily) and size == (atelier.IMAGE_SIZE, atelier.IMAGE_SIZE):
        return Renders(data_dir, count, seed)
    if len(names) == len(atelier.GARMENTS) and (family.image_channels, *size) == (1, 16, 16):
        return Garments(names, data_dir, count)
    drawn = " x ".join(map(str, size))
    raise ValueError(
        f"The pictures of {ATELIER} are captioned renders of 32 x 32, or grey garments of 16 x 16 in ten classes; this"
        f" model ({family.label}) draws {drawn}: name a folder of its kind with `data`."
    )


def _digest(pictures: torch.Tensor) -> str:
    return hashlib.sha256(pictures.numpy().tobytes()).hexdigest()
