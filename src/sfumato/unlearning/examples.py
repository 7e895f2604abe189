"""Forget and retain sets: latents with their prompts, drawn by the model itself or read from an image folder.

Latents are kept as posterior means and standard deviations, so the autoencoder runs once however long the training is,
and prompts are kept as an index into one table of embeddings, so the text encoder does too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, UnidentifiedImageError

from sfumato.families import Conditioning, Family
from sfumato.progress import Track
from sfumato.randomness import generator_for

__all__ = [
    "Examples", "ImageFolder", "PromptTable", "draw_examples", "encode_pictures", "read_image_folder",
    "refuse_same_pictures",
]  # fmt: skip

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Examples:
    """Pictures as a method sees them.

    Attributes:
        mean: Posterior means in model units, ``(N, C, H, W)``, float32, on the CPU.
        std: Posterior standard deviations, ``(N, C, H, W)``; zero for pictures that were never outside latent space.
        prompts: What each shows, ``N`` of them.
    """

    mean: torch.Tensor
    std: torch.Tensor
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.prompts)

    def latents(self, index: np.ndarray, noise: torch.Tensor) -> torch.Tensor:
        """Sample the posterior: rows `index`, with standard normal noise ``(len(index), C, H, W)``."""
        rows = torch.from_numpy(np.asarray(index))
        return self.mean[rows] + self.std[rows] * noise


class PromptTable:
    """Embeddings of a fixed set of prompts, each encoded once.

    Args:
        family: Encodes them.
        prompts: Any prompts; repetitions are stored once.
        batch_size: Prompts encoded at a time.
    """

    def __init__(self, family: Family, prompts: Sequence[str], batch_size: int = 64) -> None:
        unique = list(dict.fromkeys(prompts))
        self._row = {prompt: row for row, prompt in enumerate(unique)}
        parts = [family.encode_prompts(unique[i : i + batch_size]) for i in range(0, len(unique), batch_size)]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        # float32, as the trained copy is, whatever precision the pipeline came in; masks and classes are integers
        self._table = {n: values.float() if values.is_floating_point() else values for n, values in joined.items()}

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Give the conditioning of `prompts`, ``B`` rows in their order."""
        rows = [self._row[prompt] for prompt in prompts]
        return {name: values[rows] for name, values in self._table.items()}


def draw_examples(
    family: Family,
    prompts: Sequence[str],
    count: int,
    *,
    key: tuple[int, ...],
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
    accelerator: Accelerator,
    description: str,
) -> Examples:
    """Let the model draw its own examples, in latent space; the processes share the work.

    Args:
        family: The model.
        prompts: Drawn in turn, from the first, until there are enough.
        count: How many to draw.
        key: Seeds the pictures together with their number, so they do not depend on who draws them.
        num_inference_steps: Sampler steps.
        guidance_scale: Classifier-free guidance.
        batch_size: Pictures at a time.
        accelerator: The process group.
        description: The progress bar's label.

    Returns:
        `count` examples, the same on every process.
    """
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    latents = torch.zeros(count, *family.latent_shape, device=family.device)
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    for batch in Track(batches, description, shown=accelerator.is_main_process):
        latents[list(batch)] = family.generate(
            [prompts[number % len(prompts)] for number in batch],
            [generator_for(*key, number) for number in batch],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            latents_only=True,
        ).float()
    latents = accelerator.reduce(latents, "sum").cpu()  # each process has filled in its own rows
    if not torch.isfinite(latents).all():
        raise ValueError("The model draws NaN or infinite latents; load it with dtype=torch.float32.")
    return Examples(latents, torch.zeros_like(latents), tuple(prompts[k % len(prompts)] for k in range(count)))


def read_image_folder(family: Family, folder: str | Path, prompts: Sequence[str], *, batch_size: int = 8) -> Examples:
    """Read and encode the pictures of a folder.

    Captions come from ``metadata.jsonl`` (rows with ``file_name`` and ``text``, as the datasets library has it) if the
    folder has one; other pictures get `prompts` in turn.

    Args:
        family: Encodes the pictures, resized and centre-cropped to its native size.
        folder: A folder of pictures.
        prompts: Captions for pictures without one.
        batch_size: Pictures encoded at a time.

    Returns:
        The examples, in the order of file names.

    Raises:
        FileNotFoundError: If the folder does not exist or has no pictures.
        ValueError: If a file is not a readable picture, or ``metadata.jsonl`` is malformed.
    """
    pictures = ImageFolder(folder, family)
    texts = [text or prompts[number % len(prompts)] for number, text in enumerate(pictures.captions)]
    return encode_pictures(family, pictures.take, texts, batch_size=batch_size, description=f"encode {pictures.name}")


class ImageFolder:
    """The pictures of a folder, with the captions of its ``metadata.jsonl``; see `read_image_folder`.

    Args:
        folder: A folder of pictures.
        family: Says which size they get, and whether they become grey.

    Attributes:
        name: The folder's.
        captions: A text for each picture, in the order of file names; empty where there is none.

    Raises:
        FileNotFoundError: If the folder does not exist or has no pictures.
        ValueError: If ``metadata.jsonl`` is malformed.
    """

    def __init__(self, folder: str | Path, family: Family) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no image folder {folder}.")
        self._files = _pictures(folder)
        if not self._files:
            raise FileNotFoundError(f"The image folder {folder} has no pictures ({', '.join(IMAGE_SUFFIXES)}).")
        texts = _captions(folder / "metadata.jsonl")
        self.name = folder.name
        self.captions = [texts.get(file.relative_to(folder).as_posix(), "") for file in self._files]
        self._size, self._mode = family.image_size, "L" if family.image_channels == 1 else "RGB"

    def __len__(self) -> int:
        """Count the pictures."""
        return len(self._files)

    def take(self, positions: range) -> torch.Tensor:
        """Read some: ``(B, C, H, W)`` in [0, 1]; a ValueError names one that is no readable picture."""
        return torch.stack([_read_picture(self._files[position], self._size, self._mode) for position in positions])

    def digest(self) -> str:
        """Tell these pictures and captions from others."""
        told = hashlib.sha256(json.dumps(self.captions).encode())
        for file in self._files:
            told.update(hashlib.sha256(file.read_bytes()).digest())
        return told.hexdigest()


def encode_pictures(
    family: Family, take: Callable[[range], torch.Tensor], captions: Sequence[str], *, batch_size: int = 8,
    description: str = "encode",
) -> Examples:  # fmt: skip
    """Encode pictures, once.

    Args:
        family: Encodes them.
        take: Gives those at some positions, ``(B, C, H, W)`` in [0, 1].
        captions: What each shows; there are as many pictures.
        batch_size: Pictures encoded at a time.
        description: The progress bar's label.
    """
    means, stds = (torch.zeros(len(captions), *family.latent_shape) for _ in range(2))
    for start in Track(range(0, len(captions), batch_size), description):
        some = range(start, min(start + batch_size, len(captions)))
        mean, std = family.encode_images(take(some).to(family.device))
        means[some.start : some.stop], stds[some.start : some.stop] = mean.float().cpu(), std.float().cpu()
    return Examples(means, stds, tuple(captions))


def refuse_same_pictures(forget: str | Path, retain: str | Path) -> None:
    """Refuse, with a ValueError that names them, two folders that have a picture in common."""
    seen = {hashlib.sha256(file.read_bytes()).digest(): file for file in _pictures(forget)}
    for file in _pictures(retain):
        same = seen.get(hashlib.sha256(file.read_bytes()).digest())
        if same is not None:
            raise ValueError(f"{same} is to be forgotten and is the same picture as {file}, which is to be retained.")


def _pictures(folder: str | Path) -> list[Path]:
    return sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)


def _captions(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        found = {row["file_name"]: row["text"] for row in rows if row.get("text")}
        if not all(isinstance(text, str) for text in found.values()):
            raise TypeError("a text is no string")
        return found
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is malformed ({error}): each line must be JSON with 'file_name' and 'text'."
        ) from error


def _read_picture(file: Path, size: tuple[int, int], mode: str) -> torch.Tensor:
    """Read one picture as (C, H, W) in [0, 1]: resized to cover `size`, then cropped at the centre."""
    height, width = size
    try:
        with Image.open(file) as opened:
            picture = opened.convert(mode)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{file} is not a readable picture ({error}); remove it or replace it.") from error
    scale = max(width / picture.width, height / picture.height)
    resized = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    if resized != picture.size:
        picture = picture.resize(resized, Image.Resampling.BICUBIC)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    array = np.asarray(picture.crop((left, top, left + width, top + height)), np.float32)
    return torch.from_numpy(array / 255).reshape(height, width, -1).permute(2, 0, 1)
