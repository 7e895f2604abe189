"""Checkpoints: trained weights, optimiser state, the average if any, and the history, as safetensors and JSON.

A checkpoint is a directory that appears whole or not at all, and says which run it belongs to. Nothing is pickled, so
a checkpoint from anywhere is safe to open.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from sfumato import storage
from sfumato.sharding import local, spread_like, whole

__all__ = ["check_same_run", "newest", "processes_of", "restore", "save"]

Tensors = Mapping[str, torch.Tensor]


def newest(output_dir: Path) -> Path | None:
    """Find the newest checkpoint in a job's output folder; None if there is none."""
    return max(output_dir.glob("checkpoints/step-*"), default=None)


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
    optimizer: torch.optim.Optimizer,
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
        optimizer: Its state is saved, whatever the optimiser, as long as it is tensors and numbers.
        average: Moving average of the weights; empty if there is none.
        state: What else changes from step to step; likewise.
        history: Rows so far.
        keep: How many checkpoints to keep.
        processes: How many take part in the run.
        write: Whether this process is the one that writes.
    """
    target = output_dir / "checkpoints" / f"step-{step:08d}"
    moments = {
        f"{index}.{key}": torch.as_tensor(value)
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if value is not None
    }
    weights, moments, average = (_gather(tensors, write) for tensors in (weights, moments, average))
    if not write:
        return
    with storage.atomic_directory(target) as partial:
        for name, tensors in (
            ("weights", weights), ("optimizer", moments), ("average", average), ("state", state),
        ):  # fmt: skip
            if tensors:  # plain SGD has no moments, and not every run an average or a state
                storage.save_tensors(partial / f"{name}.safetensors", tensors)
        files = sorted(file.name for file in partial.glob("*.safetensors"))
        storage.write_text(partial / "history.json", json.dumps(history))
        progress = {"step": step, "identity": identity, "files": files, "processes": processes}
        storage.write_text(partial / "state.json", json.dumps(progress, indent=1))
    for old in sorted(target.parent.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def _gather(tensors: Tensors, keep: bool) -> dict[str, torch.Tensor]:
    """Put tensors together one by one, on the CPU if they are spread, and keep them where they are to be written."""
    gathered = {}
    for name, values in tensors.items():
        together = whole(values).cpu() if isinstance(values, DTensor) else values
        if keep:
            gathered[name] = together
    return gathered


def restore(
    checkpoint: Path, *, weights: Tensors, optimizer: torch.optim.Optimizer, average: Tensors, state: Tensors
) -> tuple[int, list[dict[str, float]]]:
    """Load a checkpoint into what is given, in place.

    Args:
        checkpoint: Its directory.
        weights: The trained parameters.
        optimizer: Over the same parameters, in the same order.
        average: Moving average to fill; empty if there is none.
        state: What else changed from step to step, to fill; likewise.

    Returns:
        The step to go on from, and the history so far.

    Raises:
        ValueError: If a file is corrupt, or holds the weights of another model.
    """
    progress = _read_json(checkpoint / "state.json")
    history = _read_json(checkpoint / "history.json")
    stored = storage.load_tensors(checkpoint / "weights.safetensors")
    if {n: t.shape for n, t in stored.items()} != {n: t.shape for n, t in weights.items()}:
        raise ValueError(f"{checkpoint} holds the weights of another model. Choose another output folder.")
    averages = storage.load_tensors(checkpoint / "average.safetensors") if average else {}
    states = storage.load_tensors(checkpoint / "state.safetensors") if state else {}
    entries: dict[int, dict[str, torch.Tensor]] = {}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = checkpoint / "optimizer.safetensors"
    for name, value in (storage.load_tensors(moments) if moments.exists() else {}).items():
        index, key = name.split(".", 1)
        parameter = trained[int(index)]
        entries.setdefault(int(index), {})[key] = (
            spread_like(value, parameter) if value.shape == parameter.shape else value
        )
    for given, found in ((weights, stored), (average, averages), (state, states)):
        for name, value in found.items():
            local(given[name]).copy_(local(spread_like(value, given[name])))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
    return int(progress["step"]), history
