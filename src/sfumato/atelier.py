"""The embedded world: Fashion-MNIST garments, rendered in four styles and six colours, with captions.

A picture is ``render(garment picture, style, colour)``; a caption names any subset of the three attributes in varied
wording. ``training/train_atelier.py`` learns its models from these two, and nothing else in the library draws or words
a picture. Everything here is a pure function of its arguments, so a data set is reproduced from a seed.

Data: Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
arXiv 1708.07747, MIT licence.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

__all__ = [
    "COLOURS",
    "GARMENTS",
    "STYLES",
    "SYNONYMS",
    "TEMPLATES",
    "caption",
    "find_fashion_mnist",
    "random_caption",
    "read_idx",
    "render",
    "small_garments",
]

GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
STYLES = ("photo", "sketch", "silhouette", "mosaic")
COLOURS = {  # corners of the hue circle: as far apart as six colours can be, (R, G, B) in [0, 1]
    "red": (0.86, 0.10, 0.12),
    "yellow": (0.93, 0.80, 0.08),
    "green": (0.12, 0.66, 0.20),
    "cyan": (0.08, 0.74, 0.84),
    "blue": (0.14, 0.22, 0.86),
    "magenta": (0.86, 0.16, 0.78),
}
SYNONYMS = {
    "t-shirt": "tee",
    "trouser": "pants",
    "pullover": "sweater",
    "dress": "gown",
    "coat": "jacket",
    "sandal": "slipper",
    "shirt": "blouse",
    "sneaker": "trainer",
    "bag": "handbag",
    "boot": "bootie",
}
TEMPLATES = {  # by the attributes named; the first wording of each is the canonical one
    "garment": ("a {garment}", "{garment}", "a picture of a {garment}"),
    "colour": ("something {colour}",),
    "style": ("a {style}", "{style}"),
    "colour+garment": ("a {colour} {garment}", "{colour} {garment}", "a picture of a {colour} {garment}"),
    "colour+style": ("a {style} of something {colour}", "something {colour}, {style}"),
    "garment+style": (
        "a {style} of a {garment}",
        "{garment}, {style}",
        "{style} of a {garment}",
        "a {garment} as a {style}",
        "{garment} {style}",
    ),
    "colour+garment+style": (
        "a {style} of a {colour} {garment}",
        "{colour} {garment}, {style}",
        "{style} of a {colour} {garment}",
        "a {colour} {garment} as a {style}",
        "{colour} {garment} {style}",
    ),
}
IMAGE_SIZE = 32
TILE = 4

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
HUB_DATASET = "zalando-datasets/fashion_mnist"
_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX file of unsigned bytes, the format Fashion-MNIST is distributed in.

    Args:
        path: A ``*-ubyte.gz`` file.

    Returns:
        A `uint8` array with the shape the file's header gives.

    Raises:
        ValueError: If the file is not an IDX file of unsigned bytes, or is cut short.
    """
    try:
        with gzip.open(path, "rb") as stream:
            raw = stream.read()
    except (EOFError, OSError) as error:
        raise ValueError(
            f"{path} can't be read as a gzipped IDX file ({error}); download or install it again."
        ) from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes.")
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", count=dimensions, offset=4).astype(int)
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
    if data.size != shape.prod():
        raise ValueError(f"{path} is cut short: its header promises {shape.prod()} bytes, it has {data.size}.")
    return data.reshape(shape).copy()  # writable, as torch.from_numpy wants it


def find_fashion_mnist(data_dir: str | Path | None = None, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Load a split of Fashion-MNIST from a folder, from Debian's package, or from the Hub, in this order.

    Args:
        data_dir: A folder that holds the four ``*-ubyte.gz`` files. If given, nothing else is tried.
        split: ``"train"`` (60,000 pictures) or ``"test"`` (10,000).

    Returns:
        Pictures ``(N, 28, 28)`` and labels ``(N,)``, both `uint8`; label ``k`` is ``GARMENTS[k]``.

    Raises:
        FileNotFoundError: If no source has the data; the message names all three.
    """
    folder = Path(data_dir) if data_dir is not None else DEBIAN_FOLDER
    images, labels = (folder / name for name in _FILES[split])
    if images.exists() and labels.exists():
        return read_idx(images), read_idx(labels)
    if data_dir is None:
        try:
            return _from_hub(split)
        except Exception as error:  # no `datasets`, no network, no such repository: all mean "not here"
            reason = f" ({type(error).__name__} from the Hub)"
    else:
        reason = ""
    raise FileNotFoundError(
        f"Fashion-MNIST was not found in {folder}{reason}. Three ways to provide it: (1) `apt install "
        f"dataset-fashion-mnist`; (2) `pip install datasets` and go online, and {HUB_DATASET} comes from the Hub; "
        f"(3) pass --data-dir with a folder that holds {', '.join(sum(_FILES.values(), ()))}."
    )


def _from_hub(split: str) -> tuple[np.ndarray, np.ndarray]:
    from datasets import load_dataset

    data = load_dataset(HUB_DATASET, split=split)
    return np.stack([np.asarray(image) for image in data["image"]]), np.asarray(data["label"], np.uint8)


def render(garments: torch.Tensor, styles: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Draw grey garments in a style and a colour.

    Args:
        garments: Grey pictures ``(B, 28, 28)``, `uint8`, black background.
        styles: Indices into `STYLES`, ``(B,)``.
        colours: Indices into `COLOURS`, ``(B,)``.

    Returns:
        RGB pictures ``(B, 3, 32, 32)`` in [0, 1], float32.
    """
    grey = F.pad(garments.float() / 255, (2, 2, 2, 2)).unsqueeze(1)  # (B, 1, 32, 32)
    palette = torch.tensor(list(COLOURS.values()), device=grey.device)
    ink = palette[colours][:, :, None, None]  # (B, 3, 1, 1)
    styles = styles.to(grey.device)
    pictures = torch.empty(len(grey), 3, IMAGE_SIZE, IMAGE_SIZE, device=grey.device)
    for index, style in enumerate(STYLES):
        chosen = styles == index
        if chosen.any():
            pictures[chosen] = _DRAW[style](grey[chosen], ink[chosen])
    return pictures


def _cover(grey: torch.Tensor) -> torch.Tensor:
    """Soft coverage of the garment, (B, 1, H, W) in [0, 1]: 1 on cloth, 0 on background."""
    return ((grey - 0.04) / 0.14).clamp(0, 1)


def _photo(grey: torch.Tensor, ink: torch.Tensor) -> torch.Tensor:
    height = torch.linspace(0.97, 0.80, IMAGE_SIZE, device=grey.device).view(1, 1, -1, 1)  # a lit studio wall
    cloth = ink * (0.30 + 0.80 * grey) + 0.16 * grey**3
    cover = _cover(grey)
    return (cover * cloth + (1 - cover) * height).clamp(0, 1)


def _sketch(grey: torch.Tensor, ink: torch.Tensor) -> torch.Tensor:
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=grey.device)
    sobel = torch.stack([kernel, kernel.T]).unsqueeze(1)  # (2, 1, 3, 3)
    edges = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), sobel).norm(dim=1, keepdim=True)
    stroke = (edges / 1.6).clamp(0, 1)
    return (stroke * (0.85 * ink) + (1 - stroke) * 1.0).clamp(0, 1)


def _silhouette(grey: torch.Tensor, ink: torch.Tensor) -> torch.Tensor:
    cover = _cover(grey)
    return cover * ink + (1 - cover) * 0.06  # a flat cut-out on near-black


def _mosaic(grey: torch.Tensor, ink: torch.Tensor) -> torch.Tensor:
    tiles = F.avg_pool2d(grey, TILE)
    shade, cover = (F.interpolate(part, scale_factor=TILE) for part in (tiles, F.avg_pool2d(_cover(grey), TILE)))
    glass = cover * ink * (0.45 + 0.75 * shade) + (1 - cover) * 0.72
    line = torch.arange(IMAGE_SIZE, device=grey.device) % TILE == 0
    grout = (line.view(-1, 1) | line.view(1, -1)).float()
    return (glass * (1 - grout) + 0.30 * grout).clamp(0, 1)


_DRAW = {"photo": _photo, "sketch": _sketch, "silhouette": _silhouette, "mosaic": _mosaic}


def caption(attributes: Mapping[str, str], rng: np.random.Generator) -> str:
    """Word a caption that names the given attributes.

    Args:
        attributes: Any subset of ``{"garment": ..., "style": ..., "colour": ...}``.
        rng: Chooses the wording among `TEMPLATES`.

    Returns:
        For instance ``"a sketch of a red sneaker"``; ``""`` if nothing is named.
    """
    if not attributes:
        return ""
    wordings = TEMPLATES["+".join(sorted(attributes))]
    return wordings[rng.integers(len(wordings))].format(**attributes)


def random_caption(garment: int, style: int, colour: int, rng: np.random.Generator) -> str:
    """Word a caption for a training picture.

    Args:
        garment: Index into `GARMENTS`; it may go by its synonym.
        style: Into `STYLES`.
        colour: Into `COLOURS`.
        rng: Chooses what is named: each attribute may be left out, and one time in ten all are.
    """
    if rng.random() < 0.1:
        return ""
    name = GARMENTS[garment]
    attributes = {
        "garment": SYNONYMS[name] if rng.random() < 0.15 else name,
        "style": STYLES[style],
        "colour": list(COLOURS)[colour],
    }
    chance = {"garment": 0.9, "style": 0.75, "colour": 0.75}
    return caption({kind: word for kind, word in attributes.items() if rng.random() < chance[kind]}, rng)


def small_garments(garments: np.ndarray) -> torch.Tensor:
    """Shrink grey garments ``(N, 28, 28)``, `uint8`, to those of ``atelier-pixel``, ``(N, 1, 16, 16)`` in [-1, 1]."""
    padded = F.pad(torch.from_numpy(garments).float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    return F.avg_pool2d(padded.unsqueeze(1), 2)
