"""``sfumato restore``: degraded pictures in; restored ones, and each beside its original, in a folder out."""

from __future__ import annotations

import errno
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

import sfumato
from sfumato import storage
from sfumato.boundary import Boundary
from sfumato.evaluation.report import picture_grid
from sfumato.loading import folder_of
from sfumato.pipelines.restoration import RestorationPipeline, degraded_start
from sfumato.pipelines.restoration_pictures import Picture, read_masks, read_pictures
from sfumato.progress import Track, are_hidden
from sfumato.restoration.degradations import TASKS
from sfumato.settings import check_device, check_seed

__all__ = ["RestoringConfig", "run_restore"]

RESULT_FILE = "restored.json"
MAY_CHANGE = {"output", "batch_size", "device", "resume"}
"""Settings that a run which goes on may be given anew: they do not change what it does."""

FAULTS = (ValueError, OSError, RuntimeError, MemoryError)
"""What one picture may end in, and not the others: it is broken, too large, or its result can't be written."""
FOREIGN = {
    ".arw", ".avif", ".cr2", ".cr3", ".dng", ".exr", ".hdr", ".heic", ".heif", ".jxl", ".nef", ".orf", ".raf", ".rw2",
}  # fmt: skip
"""Endings of pictures that PIL may have no reader for: in a folder these are listed, and not passed over."""
NAME_BYTES = 200
"""Of a result's name: file systems take 255, and storage's own additions and a number are to fit."""


@dataclass
class RestoringConfig:
    """What to restore, and how.

    Attributes:
        images: Files of pictures, and folders of such.
        output: A new or empty folder; with `resume` that of a run that was cut short.
        model: ``"atelier-sr"``, ``"atelier-inpaint"``, or a folder that ``save_pretrained`` of a restoration pipeline
            wrote.
        task: What is expected of the model: ``"sr"``, ``"inpaint"``, ``"denoise"`` or ``"deblur"``; None takes what
            it does. (The folder of a training run tells that; of others, denoising and deblurring are not told apart.)
        scale: Size of the result over that of the picture that is expected of the model; None takes the model's.
        mask: File of the mask for a model that fills holes, white where it is to fill; it serves all pictures.
        num_inference_steps: Steps; None for the model's.
        tile_size: Side of the tiles that the network sees, in pixels of the result; None for the size that it was
            trained on, 0 for the whole picture at once.
        tile_overlap: Of tiles, in pixels of the result; None for a quarter of them.
        batch_size: Pictures that are restored at once, if they have one size.
        seed: Seeds the noise, the same for every picture, so that none depends on the others.
        device: Where to run, or None for an accelerator if there is one.
        boundary: A file of `sfumato.find_boundary`, whose noise all pictures start from.
        compare: ``"row"`` writes each picture beside what came of it, ``"none"`` does not.
        resume: Go on with a run that was cut short: what it has restored stays, what failed is tried again.
    """

    images: Sequence[str]
    output: str
    model: str
    task: str | None = None
    scale: int | None = None
    mask: str | None = None
    num_inference_steps: int | None = None
    tile_size: int | None = None
    tile_overlap: int | None = None
    batch_size: int = 1
    seed: int = 0
    device: str | None = None
    boundary: str | None = None
    compare: str = "row"
    resume: bool = False


@dataclass
class _Job:
    """A picture on its way: its file, the name that its result gets, and what was read."""

    source: Path
    name: str
    image: Any = None
    error: str | None = None


def run_restore(config: RestoringConfig) -> dict[str, Any]:
    """Restore pictures; one that can't be does not keep the others from it.

    Args:
        config: What and how.

    Returns:
        What ``restored.json`` holds, which is written after each batch: the settings, the model, under ``pictures``
        and ``failures`` what became of each (``comparison_error`` says why one has no comparison), and, as
        ``remaining``, how many are still to come. Beside it are the restored pictures, as PNG of 8 bits, or of 16 for
        grey pictures of 16 bits (PIL reads no others), and, under ``comparisons``, each beside its original.

    Raises:
        FileExistsError: If the output folder holds something, and not, with `resume`, a run that was cut short.
        FileNotFoundError: If a picture, the mask, the boundary or the model is missing.
        OSError: If the disk is full.
        ValueError: If the settings, or the model, do not fit the task, or the run to go on with is another.
    """
    output = Path(config.output)
    _check_settings(config)
    jobs = _jobs(_files(config.images))
    own = _own_files(output, jobs)
    storage.check_output_dir(output, resume=config.resume, own=own)
    mask = None if config.mask is None else _read(Path(config.mask))
    boundary = None if config.boundary is None else Boundary.load(config.boundary)
    pipe = _load(config)
    call = {
        name: getattr(config, name)
        for name in ("num_inference_steps", "tile_size", "tile_overlap")
        if getattr(config, name) is not None
    }
    pipe.check_settings(**call)
    pipe.set_progress_bar_config(desc="restore", disable=len(jobs) > 1 or are_hidden())
    call |= {} if boundary is None else {"latents": boundary.noise_for(pipe, config.num_inference_steps)}
    call |= {} if mask is None else {"mask_image": mask}
    _check_fit(pipe, jobs, config, call)
    settings = json.loads(json.dumps({name: value for name, value in asdict(config).items() if name != "resume"}))
    report: dict[str, Any] = {"settings": settings, **_facts(pipe), "pictures": [], "failures": []}
    with storage.claimed(output, resume=config.resume, own=own), _full_disk_explained(output):
        report["pictures"] = _restored_before(output, report, jobs)
        done = {picture["source"] for picture in report["pictures"]}
        waiting = [job for job in jobs if str(job.source) not in done]
        _note(output, report, len(waiting))
        batches = [waiting[first : first + config.batch_size] for first in range(0, len(waiting), config.batch_size)]
        before = -(-len(done) // config.batch_size)
        for batch in Track(batches, "restore", shown=len(jobs) > 1, start=before):  # one picture's bar is the pipe's
            for job, restored, seconds in _restore(pipe, batch, call, config.seed):
                facts = None if restored is None else _written(output, job, restored)
                if restored is not None and facts is not None:
                    if config.compare == "row":
                        facts |= _compared(output, job, restored, mask, pipe.config.scale)
                    report["pictures"].append({"source": str(job.source), **facts, "seconds": seconds})
                else:
                    report["failures"].append({"source": str(job.source), "error": job.error})
                job.image = None  # a folder of pictures need not stay in memory
            _note(output, report, report["remaining"] - len(batch))
    return report


# ------------------------------------------------------------ before the long work


def _check_settings(config: RestoringConfig) -> None:
    check_seed(config.seed)
    check_device(config.device)
    if config.task not in (None, *TASKS):
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {config.task!r}.")
    if config.compare not in ("row", "none"):
        raise ValueError(f"`compare` must be row or none, got {config.compare!r}.")
    if config.batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {config.batch_size}.")


def _own_files(output: Path, jobs: Sequence[_Job]) -> frozenset[str]:
    """What a run leaves in its folder, if there is one in it; raises a FileExistsError if nothing is left to do."""
    path = output / RESULT_FILE
    if not path.is_file():
        return frozenset()
    earlier = storage.read_json(path)
    if not earlier.get("remaining") and not earlier.get("failures"):
        raise FileExistsError(f"{output} already holds restored pictures. Choose an empty or new output folder.")
    return frozenset({RESULT_FILE, "comparisons", *(f"{job.name}.png" for job in jobs)})


def _restored_before(output: Path, report: dict[str, Any], jobs: Sequence[_Job]) -> list[dict[str, Any]]:
    """The pictures that an earlier start of this run has restored; raises a ValueError if it is another run's folder.

    Pictures may have been added since, as long as none of them takes the name of another.
    """
    path = output / RESULT_FILE
    if not path.is_file():
        return []
    earlier = storage.read_json(path)
    there: Any = earlier.get("settings")
    here = report["settings"]
    known = isinstance(there, dict) and isinstance(earlier.get("pictures"), list)
    differing = [name for name in here if name not in MAY_CHANGE and known and there.get(name) != here[name]]
    if not differing and earlier.get("fingerprints") != report["fingerprints"]:
        differing = ["model's weights"]
    names = {str(job.source): f"{job.name}.png" for job in jobs}
    found: list[dict[str, Any]] = earlier["pictures"] if known else []
    if not differing and any(names.get(picture["source"]) != picture["file"] for picture in found):
        differing = ["pictures"]
    if not known or differing:
        raise ValueError(
            f"{output} holds another run: its {', '.join(differing or ['report'])} differ. Resume with the same"
            " settings, or choose another output folder."
        )
    return [picture for picture in found if (output / picture["file"]).is_file()]


def _note(output: Path, report: dict[str, Any], remaining: int) -> None:
    """Write down how far the run has come."""
    report["remaining"] = remaining
    storage.write_text(output / RESULT_FILE, json.dumps(report, indent=1))


def _files(images: Sequence[str]) -> list[Path]:
    """The files that are named, and those of pictures in folders that are; of these some must be readable."""
    kinds, found = Image.registered_extensions(), []
    known = {ending for ending, kind in kinds.items() if kind in Image.OPEN or kind == "MPO"}  # opened as JPEG
    for path in map(Path, images):
        if path.is_dir():
            shown = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
            inside = [file for file in shown if file.suffix.lower() in known]
            if not inside:
                raise ValueError(f"The folder {path} holds no pictures.")
            found += [file for file in shown if file.suffix.lower() in known | FOREIGN]
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"There is no picture {path}.")
    return list(dict.fromkeys(found))


def _jobs(files: Sequence[Path]) -> list[_Job]:
    """Give each file a name of its own for the result: its stem, cut if it is long, numbered where another has it."""
    jobs, taken = [], set()
    for file in files:
        whole = os.fsencode(file.stem)
        stem = file.stem if len(whole) <= NAME_BYTES else whole[:NAME_BYTES].decode(errors="ignore")
        name, number = stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        jobs.append(_Job(file, name))
    return jobs


def _read(path: Path) -> Image.Image:
    """Read a picture, all of it."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no picture {path}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty.")
    try:
        image = Image.open(path)
        image.load()
    except Exception as error:  # decoders raise anything for broken data
        raise ValueError(f"{path} can't be read as a picture ({' '.join(str(error).split())}).") from error
    return image


def _load(config: RestoringConfig) -> Any:
    """Load the model, and see that it does what is expected."""
    if not folder_of(config.model).is_dir():
        raise FileNotFoundError(
            f"There is no model folder {config.model}. One on the Hub is fetched first: hf download REPO --local-dir"
            " FOLDER."
        )
    pipe: Any = sfumato.load(config.model)
    if not isinstance(pipe, RestorationPipeline):
        raise ValueError(
            f"{config.model} is a {type(pipe).__name__}, which restores no pictures: name a model of ResShiftPipeline"
            " or RDDMPipeline."
        )
    scale, masked = pipe.config.scale, pipe.config.masked
    able = _able(config.model, scale, masked)
    if config.task is not None and config.task not in able:
        raise ValueError(f"{config.model} is a model for {' or '.join(able)}, not for {config.task}.")
    if config.scale not in (None, scale):
        raise ValueError(f"{config.model} gives {scale} times the size, not {config.scale} times: drop --scale.")
    if masked and config.mask is None:
        raise ValueError(f"{config.model} fills holes: give --mask, a picture that is white where it is to fill.")
    if config.mask is not None and not masked:
        raise ValueError(f"{config.model} is not given masks: drop --mask.")
    return pipe.to(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _able(model: str, scale: int, masked: bool) -> tuple[str, ...]:
    """Tasks that a model may be for: the one that it was trained for, if its manifest says that."""
    able = ("inpaint",) if masked else ("sr",) if scale > 1 else ("denoise", "deblur")
    manifest = folder_of(model) / "manifest.json"
    facts: Any = storage.read_json(manifest).get("settings") if manifest.is_file() else {}
    degradation = facts.get("degradation", {}) if isinstance(facts, dict) else {}
    if degradation is None:
        raise ValueError(f"{model} was trained to draw pictures, not to restore any: name a model that was.")
    task: Any = degradation.get("task") if isinstance(degradation, dict) else None
    return (task,) if task in able else able


def _check_fit(pipe: Any, jobs: Sequence[_Job], config: RestoringConfig, call: dict[str, Any]) -> None:
    """Raise a ValueError for a mask or noise that fits none of the pictures: that is no fault of theirs."""
    mask, latents = call.get("mask_image"), call.get("latents")
    if mask is not None:
        _check_mask(mask, _named(mask, config.mask), config.mask)  # it has its own size; does it mark anything?
    misfit: ValueError | None = None
    for job in jobs if call.keys() & {"mask_image", "latents"} else ():
        try:
            picture = _named(_read(job.source), job.source)
        except (ValueError, OSError):
            continue  # said when it is its turn
        try:
            if mask is not None:
                _check_mask(mask, picture, config.mask)
            if latents is not None and tuple(latents.shape) != (1, *(shape := pipe.latents_shape(*picture.size))):
                raise ValueError(
                    f"The noise of {config.boundary} has the shape {tuple(latents.shape)}, {job.source} needs"
                    f" {(1, *shape)}: restore pictures of the size that it was searched for."
                )
            return
        except ValueError as error:
            misfit = misfit or error
    if misfit is not None:
        raise misfit


def _named(image: Image.Image, path: Any) -> Picture:
    """A picture as networks see it; what is wrong with it is said with its path."""
    try:
        return read_pictures(image)[0]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_mask(mask: Image.Image, picture: Picture, path: Any) -> None:
    try:
        read_masks(mask, [picture])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _facts(pipe: Any) -> dict[str, Any]:
    """What the model is."""
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        "sfumato": sfumato.__version__,
        "pipeline": type(pipe).__name__,
        "fingerprints": {name: storage.fingerprint(part.named_parameters()) for name, part in networks.items()},
        "device": str(pipe.device),
    }


# ------------------------------------------------------------ the work


def _restore(
    pipe: Any, batch: Sequence[_Job], call: dict[str, Any], seed: int
) -> Iterator[tuple[_Job, Image.Image | None, float]]:
    """Restore a batch; gives each picture, None for what can't be, and its seconds, in the order of the batch."""
    for job in batch:
        try:
            job.image = _read(job.source)
            _named(job.image, job.source)
        except (ValueError, OSError) as error:
            job.image, job.error = None, str(error)
    for readable, group in groupby(batch, key=lambda job: job.image is not None):
        members = list(group)
        if not readable:
            yield from ((job, None, 0.0) for job in members)
            continue
        done = _attempt(pipe, members, call, seed)
        if done is None and len(members) > 1:  # one of them is the reason, or all together are too much
            for job in members:
                yield from _attempt(pipe, [job], call, seed) or [(job, None, 0.0)]
        else:
            yield from done or [(members[0], None, 0.0)]


def _attempt(
    pipe: Any, jobs: Sequence[_Job], call: dict[str, Any], seed: int
) -> list[tuple[_Job, Image.Image | None, float]] | None:
    """Restore pictures together; None, and the reason in each, if that fails."""
    began = time.perf_counter()
    try:
        generators = [torch.Generator().manual_seed(seed) for _ in jobs]
        images = pipe([job.image for job in jobs], generator=generators, **call).images
    except FAULTS as error:
        for job in jobs:
            job.error = f"{job.source} can't be restored ({_said(error)})"
        return None
    seconds = (time.perf_counter() - began) / len(jobs)
    return [(job, image, seconds) for job, image in zip(jobs, images, strict=True)]


def _written(output: Path, job: _Job, restored: Image.Image) -> dict[str, Any] | None:
    """Write a result, with the colour profile of its original; None, and the reason in the job, if that fails."""
    profile = job.image.info.get("icc_profile") if job.image.mode in ("L", "LA", "RGB", "RGBA", "P") else None
    try:
        storage.write_bytes(output / f"{job.name}.png", _png(restored, icc_profile=profile))
    except FAULTS as error:
        _raise_if_full(error)
        job.error = f"{job.source} was restored, but can't be written ({_said(error)})"
        return None
    return {"file": f"{job.name}.png", "width": restored.width, "height": restored.height}


def _compared(output: Path, job: _Job, restored: Image.Image, mask: Any, scale: int) -> dict[str, Any]:
    """Write the comparison; a result without one is still a result."""
    comparison = f"comparisons/{job.name}.png"
    try:
        storage.write_bytes(output / comparison, _png(_row(job.image, restored, mask, scale)))
    except FAULTS as error:
        _raise_if_full(error)
        return {"comparison_error": _said(error)}
    return {"comparison": comparison}


def _said(error: BaseException) -> str:
    """What an error says; some say nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def _raise_if_full(error: BaseException) -> None:
    """Raise an error again that all pictures which follow would end in."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise error


@contextmanager
def _full_disk_explained(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"The disk of {output} is full ({error.strerror}): free some space, and go on with --resume."
        ) from error


def _row(image: Image.Image, restored: Image.Image, mask: Any, scale: int) -> Image.Image:
    """The original at the result's size by nearest pixels and, where it grew, bicubic; beside them the result."""
    (picture,) = read_pictures(image)
    pixels = picture.pixels[None]  # (1, 3, h, w)
    if mask is not None:
        pixels = pixels.masked_fill(read_masks(mask, [picture])[0], 0)
    (result,) = read_pictures(restored)
    columns = [F.interpolate(pixels, scale_factor=scale, mode="nearest")]
    columns += [degraded_start(pixels, scale).clamp(0, 1)] if scale > 1 else []
    columns += [result.pixels[None]]
    return picture_grid(torch.stack(columns, dim=1), scale=max(1, 256 // max(result.size)), gap=8)


def _png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()
