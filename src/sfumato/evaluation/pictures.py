"""The generation pass that all metrics share: each picture is drawn once, kept on disk, and the same whoever draws it.

A picture is known by what it was made from: the model's weights, the scheduler, the prompt, the seed and the settings.
With a cache folder it is drawn once for all metrics, all runs and all processes, and a run that was killed goes on
where it stopped. Pictures are 8-bit throughout, so that those of the cache and fresh ones agree to the bit.
"""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps, PngImagePlugin

from sfumato import storage
from sfumato.evaluation.fingerprints import digest, model_fingerprint, scheduler_facts
from sfumato.families import Family, family_of
from sfumato.progress import Track
from sfumato.randomness import generator_for
from sfumato.trainer import process_group

__all__ = ["Request", "draw_pictures", "model_fingerprint", "read_pictures"]

logger = logging.getLogger(__name__)

FORMAT = "sfumato-picture-1"
CHECKSUM = "sfumato"  # the PNG's text chunk that says what the file should hold


class Request(NamedTuple):
    """A picture that is asked for.

    Attributes:
        prompt: What it should show.
        seed: The key of its generator, non-negative integers; see `sfumato.randomness.generator_for`.
    """

    prompt: str
    seed: tuple[int, ...]


def draw_pictures(
    pipe: DiffusionPipeline,
    requests: Sequence[Request],
    *,
    num_inference_steps: int = 20,
    guidance_scale: float = 3.0,
    batch_size: int = 32,
    cache: str | Path | None = None,
    description: str | None = "draw",
) -> torch.Tensor:
    """Draw a picture for each request, or take it from the cache.

    Several processes, as ``accelerate launch`` starts them, share the work through the cache; each gets all pictures.
    They are drawn in the batches that one process would draw them in, so that they are the same to the bit: the
    arithmetic of some networks depends, in its last digits, on the batch.

    Args:
        pipe: The model.
        requests: ``N`` of them; one that is asked for twice is drawn once.
        num_inference_steps: Sampler steps.
        guidance_scale: Classifier-free guidance; 1 is none.
        batch_size: Pictures at a time.
        cache: A folder for the pictures, which may be shared by models and by runs at the same time; None keeps them
            in memory, or, with several processes, in a temporary folder.
        description: The progress bar's label; None shows no bar.

    Returns:
        Pictures ``(N, 3, H, W)`` in [0, 1], float32, in steps of 1/255, on the CPU.

    Raises:
        ValueError: If nothing is asked for, or `batch_size` is below 1.
        RuntimeError: If the model's pictures are not finite.
    """
    if not requests or batch_size < 1:
        raise ValueError(f"Ask for at least one picture, in batches of at least 1: got {len(requests)}, {batch_size}.")
    family, steps, guidance = family_of(pipe), num_inference_steps, guidance_scale
    unique = list(dict.fromkeys(requests))
    _warn_of_cuts(family, unique)
    group = process_group()
    with _shared(cache, group) as folder:
        files = {} if folder is None else _files(folder, pipe, unique, steps, guidance)
        have = {request: picture for request, file in files.items() if (picture := _read(file)) is not None}
        missing = _agreed([request for request in unique if request not in have], group)
        batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
        rank, count = (0, 1) if group is None else (group.process_index, group.num_processes)
        for batch in Track(batches[rank::count], description, shown=description is not None and rank == 0):
            for request, picture in zip(batch, _draw(family, batch, steps, guidance), strict=True):
                have[request] = picture
                if request in files:
                    _write(files[request], picture)
        if group is not None:
            group.wait_for_everyone()
            have |= {request: _drawn_elsewhere(files[request]) for request in unique if request not in have}
            group.wait_for_everyone()  # a temporary folder goes when all have read it
    return torch.stack([have[request] for request in requests]).float() / 255


def read_pictures(folder: str | Path, size: tuple[int, int]) -> torch.Tensor:
    """Read a user's pictures, cut to the middle and scaled to one size.

    Args:
        folder: Searched for ``.png``, ``.jpg``, ``.jpeg`` and ``.webp``, folders in it too.
        size: Height and width, in pixels.

    Returns:
        Pictures ``(N, 3, H, W)`` in [0, 1], float32, in the order of their paths.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If one can't be read.
    """
    kinds = {".png", ".jpg", ".jpeg", ".webp"}
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in kinds)
    if not files:
        raise FileNotFoundError(f"There are no pictures ({', '.join(sorted(kinds))}) in {folder}.")
    return torch.stack([_scaled(file, size) for file in files]).float() / 255


def _scaled(file: Path, size: tuple[int, int]) -> torch.Tensor:
    """A picture of that height and width, (3, H, W), bytes."""
    try:
        with Image.open(file) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (size[1], size[0]), Image.Resampling.BICUBIC)
    except OSError as error:
        raise ValueError(f"{file} can't be read as a picture ({error}); mend or remove it.") from error
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


@contextmanager
def _shared(cache: str | Path | None, group: PartialState | None) -> Iterator[Path | None]:
    """The folder that the pictures go through; a temporary one where several processes need one and have none."""
    if cache is not None or group is None:
        yield None if cache is None else Path(cache)
        return
    told: list[str | None] = [tempfile.mkdtemp(prefix="sfumato-") if group.is_main_process else None]
    (path,) = broadcast_object_list(told)
    assert path is not None  # the first process made it
    try:
        yield Path(path)
    finally:
        if group.is_main_process:
            shutil.rmtree(path, ignore_errors=True)


def _agreed(missing: list[Request], group: PartialState | None) -> list[Request]:
    """What the first process found missing: another run may be filling the cache while they look."""
    if group is None:
        return missing
    (agreed,) = broadcast_object_list([missing])
    return list(agreed)


@torch.no_grad()
def _draw(family: Family, batch: Sequence[Request], steps: int, guidance: float) -> torch.Tensor:
    """Pictures (B, 3, H, W), bytes."""
    generators = [generator_for(*request.seed) for request in batch]
    pictures = family.generate(
        [request.prompt for request in batch], generators, num_inference_steps=steps, guidance_scale=guidance
    ).cpu()
    finite = pictures.flatten(1).isfinite().all(1)
    if not finite.all():
        prompt = batch[int(finite.logical_not().int().argmax())].prompt
        raise RuntimeError(
            f"The model's picture for {prompt!r} has values that are not finite: its weights are broken, or too large "
            f"for {family.dtype}; load it with --dtype float32, or unlearn with a lower learning rate."
        )
    shades = (255 * pictures.clamp(0, 1)).round().to(torch.uint8)
    return shades.expand(-1, 3, -1, -1).contiguous()  # models of grey pictures have one channel


def _warn_of_cuts(family: Family, requests: Sequence[Request]) -> None:
    """Say what stock pipelines only log: that a prompt's end is not seen."""
    cut = [prompt for prompt in dict.fromkeys(request.prompt for request in requests) if family.is_cut(prompt)]
    if cut:
        others = f", and those of {len(cut) - 1} other prompts," if len(cut) > 1 else ""
        logger.warning(
            "The end of the prompt %r%s is not seen: longer than the text encoder's limit, it is cut.", cut[0], others
        )


def _files(
    folder: Path, pipe: DiffusionPipeline, requests: Sequence[Request], steps: int, guidance: float
) -> dict[Request, Path]:
    """Where each picture is kept."""
    model, family = model_fingerprint(pipe), family_of(pipe)
    drawn_with = {
        "format": FORMAT, "model": model, "device": family.device.type, **scheduler_facts(pipe), "steps": steps,
        "guidance": float(guidance), "size": family.image_size,
    }  # fmt: skip
    keys = {request: digest({**drawn_with, "prompt": request.prompt, "seed": request.seed}) for request in requests}
    return {request: folder / model[:8] / f"{key}.png" for request, key in keys.items()}


def _checksum(file: Path, picture: torch.Tensor) -> str:
    """Of a picture under its key: PNG's own checksums are not looked at by all readers."""
    shape = str(tuple(picture.shape))
    return hashlib.sha256(f"{file.stem}{shape}".encode() + picture.contiguous().numpy().tobytes()).hexdigest()


def _write(file: Path, picture: torch.Tensor) -> None:
    """Keep a picture (3, H, W), bytes."""
    text = PngImagePlugin.PngInfo()
    text.add_text(CHECKSUM, _checksum(file, picture))
    stream = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(stream, "PNG", pnginfo=text, compress_level=1)
    storage.write_bytes(file, stream.getvalue())


def _read(file: Path) -> torch.Tensor | None:
    """A picture (3, H, W), bytes; None if it is not there, or is not what was written."""
    try:
        with Image.open(file) as image:
            said = image.info.get(CHECKSUM)
            picture = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # absent, cut short or overwritten
        return None
    return picture if said == _checksum(file, picture) else None


def _drawn_elsewhere(file: Path) -> torch.Tensor:
    picture = _read(file)
    if picture is None:
        raise RuntimeError(f"{file}, which another process has drawn, can't be read: is the cache on a shared disk?")
    return picture
