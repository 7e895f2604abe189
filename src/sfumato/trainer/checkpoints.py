"""Checkpoints: trained weights, optimiser state, the average if any, and the history, as safetensors and JSON.

A checkpoint is a directory that appears whole or not at all, and says which run it belongs to. Nothing is pickled, so
a checkpoint from anywhere is safe to open.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from sfumato import storage
from sfumato.sharding import whole

__all__ = ["Stored", "best_weights", "check_same_run", "load", "newest", "processes_of", "save", "step_of"]

Tensors = Mapping[str, torch.Tensor]

_FILES = ("weights.safetensors", "optimizer.safetensors", "average.safetensors", "state.safetensors")


def newest(output_dir: Path) -> Path | None:
    """Find the newest checkpoint in a job's output folder; None if there is none."""
    return max(output_dir.glob("checkpoints/step-*"), default=None)


def step_of(checkpoint: Path) -> int:
    """Give the optimiser steps that had been taken at a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def best_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read what would be the result if the run ended at a checkpoint: the average, if it keeps one, or the weights."""
    average = checkpoint / "average.safetensors"
    return storage.load_tensors(average if average.exists() else checkpoint / "weights.safetensors")


def check_same_run(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to resume from the checkpoint of another run.

    Args:
        checkpoint: A checkpoint's directory.
        identity: What makes a run that run, as JSON can hold it.

    Raises:
        ValueError: If it differs from what the checkpoint stored; the message says in what.
    """
    state = _read_json(checkpoint / "state.json")
    if not {"identity", "step", "files"} <= set(state):
        raise ValueError(f"{checkpoint / 'state.json'} is damaged; delete {checkpoint} to fall back.")
    _read_json(checkpoint / "history.json")
    for name in state["files"]:
        try:
            storage.read_metadata(checkpoint / name)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"{error} This is a checkpoint: delete {checkpoint} to fall back.") from error
    stored = state["identity"]
    differing = [key for key in identity if stored.get(key) != identity[key]]
    if differing:
        there, here = stored.get(differing[0]), identity[differing[0]]
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            name = next(key for key in here if there.get(key) != here[key])
            differing, there, here = [f"{differing[0]}.{name}", *differing[1:]], there.get(name), here[name]
        raise ValueError(
            f"{checkpoint} is a checkpoint of another run: {', '.join(differing)} differ (there {_brief(there)}, here "
            f"{_brief(here)}). Resume with the same model and settings, or choose another output folder."
        )


def processes_of(checkpoint: Path) -> int:
    """Give how many processes took part in the run that a checkpoint is of."""
    return int(_read_json(checkpoint / "state.json").get("processes", 1))


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); delete {path.parent} to fall back.") from error


def save(
    output_dir: Path,
    step: int,
    *,
    identity: Mapping[str, Any],
    weights: Tensors,
    moments: Iterable[tuple[str, torch.Tensor]],
    average: Tensors,
    state: Tensors,
    history: list[dict[str, float]],
    keep: int,
    processes: int = 1,
    write: bool = True,
) -> None:
    """Write a checkpoint, then drop the ones too many; a kill in between leaves at least one whole.

    All processes must call it, as weights that are spread over them are put together; one of them writes.

    Args:
        output_dir: The job's output folder.
        step: Optimiser steps taken so far.
        identity: See `check_same_run`.
        weights: The trained parameters.
        moments: The optimiser's state, named.
        average: Moving average of the weights; empty if there is none.
        state: What else changes from step to step; likewise.
        history: Rows so far.
        keep: How many checkpoints to keep.
        processes: How many take part in the run.
        write: Whether this process is the one that writes.
    """
    target = output_dir / "checkpoints" / f"step-{step:08d}"
    gathered = [_gather(tensors, write) for tensors in (weights.items(), moments, average.items())]
    if not write:
        return
    with storage.atomic_directory(target) as partial:
        for name, tensors in zip(_FILES, [*gathered, state], strict=True):
            if tensors:  # plain SGD has no moments, and not every run an average or a state
                storage.save_tensors(partial / name, tensors)
        files = sorted(file.name for file in partial.glob("*.safetensors"))
        storage.write_text(partial / "history.json", json.dumps(history))
        progress = {"step": step, "identity": identity, "files": files, "processes": processes}
        storage.write_text(partial / "state.json", json.dumps(progress, indent=1))
    for old in sorted(target.parent.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def _gather(tensors: Iterable[tuple[str, torch.Tensor]], keep: bool) -> dict[str, torch.Tensor]:
    """Put tensors together one by one, on the CPU if they are spread, and keep them where they are to be written."""
    gathered = {}
    for name, values in tensors:
        together = whole(values).cpu() if isinstance(values, DTensor) else values
        if keep:
            gathered[name] = together
    return gathered


class Stored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        step: The step to go on from.
        history: The rows so far.
        weights: The trained parameters.
        moments: The optimiser's state.
        average: Moving average of the weights; empty if there is none.
        state: What else changed from step to step; likewise.
    """

    step: int
    history: list[dict[str, float]]
    weights: Tensors
    moments: Tensors
    average: Tensors
    state: Tensors


def load(checkpoint: Path, shapes: Mapping[str, torch.Size]) -> Stored:
    """Read a checkpoint.

    Args:
        checkpoint: Its directory.
        shapes: Of the parameters that are trained.

    Returns:
        All of it, on the CPU.

    Raises:
        ValueError: If a file is corrupt, or holds the weights of another model.
    """
    progress = _read_json(checkpoint / "state.json")
    history = _read_json(checkpoint / "history.json")
    weights, moments, average, state = (
        storage.load_tensors(checkpoint / name) if name in progress["files"] else {} for name in _FILES
    )
    if {name: values.shape for name, values in weights.items()} != dict(shapes):
        raise ValueError(f"{checkpoint} holds the weights of another model. Choose another output folder.")
    return Stored(int(progress["step"]), history, weights, moments, average, state)
