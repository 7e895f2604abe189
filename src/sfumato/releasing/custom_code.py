"""Schedulers and pipelines of this package in a release: as files of it, which load where sfumato is not installed.

diffusers takes ``["scheduling_bdia", "BDIAScheduler"]`` in ``model_index.json`` for ``scheduler/scheduling_bdia.py``,
and ``["pipeline_x", "XPipeline"]`` as ``_class_name`` for ``pipeline_x.py`` at the top, if the user agrees by
``trust_remote_code=True``. It carries along the files that these import directly from beside them.
"""

from __future__ import annotations

import ast
import inspect
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

import sfumato
from sfumato import storage

__all__ = [
    "CustomCode", "add_custom_code", "find_custom_code", "scheduler_named", "ship_code", "ship_model_code",
]  # fmt: skip

_STOCK = ("diffusers", "transformers")


@dataclass(frozen=True)
class CustomCode:
    """Classes of ours that a release needs.

    Attributes:
        scheduler: Of its scheduler; None if that is stock diffusers'.
        replaced: Whether the scheduler takes the place of another, whose settings it is given.
        pipeline: Of the pipeline; None likewise.
    """

    scheduler: Any = None
    replaced: bool = False
    pipeline: Any = None

    @property
    def names(self) -> list[str]:
        """The classes' names."""
        return [found.__name__ for found in (self.scheduler, self.pipeline) if found is not None]


def scheduler_named(name: str) -> Any:
    """Find one of our schedulers.

    Args:
        name: ``"bdia"``, ``"time-shift"`` or ``"BDIAScheduler"``; case, dashes and underscores do not matter.

    Returns:
        The class.

    Raises:
        ValueError: If there is none of that name.
    """
    known = {
        name_.removesuffix("Scheduler").lower(): name_ for name_ in sfumato.__all__ if name_.endswith("Scheduler")
    }
    plain = name.lower().replace("-", "").replace("_", "").removesuffix("scheduler")
    if plain not in known:
        raise ValueError(f"There is no scheduler {name!r}; choose from {', '.join(sorted(known.values()))}.")
    return getattr(sfumato, known[plain])


def find_custom_code(index: Mapping[str, Any], scheduler: str | None) -> CustomCode:
    """Find what code of ours a saved pipeline needs.

    Args:
        index: Its ``model_index.json``; empty if the pipeline is not released.
        scheduler: A scheduler of ours to give it.

    Returns:
        The classes.

    Raises:
        ValueError: If the pipeline needs code that is not ours, or there is none to give the scheduler to.
    """
    if scheduler is not None and not index:
        raise ValueError("`scheduler` goes with the whole pipeline: the formats must include full.")
    own = None
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or None in entry:
            continue
        if entry[0] in _STOCK:
            continue
        if name != "scheduler" or not str(entry[0]).startswith("sfumato.schedulers."):
            raise ValueError(f"The pipeline's {name} is {entry}, which is code of neither diffusers nor sfumato.")
        own = scheduler_named(str(entry[1]))
    chosen = scheduler_named(scheduler) if scheduler is not None else own
    return CustomCode(chosen, scheduler is not None, _pipeline(index.get("_class_name")))


def _pipeline(named: Any) -> Any:
    if named is None or (isinstance(named, str) and hasattr(diffusers, named)):
        return None
    if isinstance(named, str) and named.endswith("Pipeline") and named in sfumato.__all__:
        return getattr(sfumato, named)
    raise ValueError(f"The pipeline is a {named}, which is code of neither diffusers nor sfumato.")


def add_custom_code(code: CustomCode, release: Path) -> None:
    """Put the files into a release that holds the whole pipeline, and name them in its index.

    Args:
        code: The classes.
        release: The release.
    """
    index = storage.read_json(release / "model_index.json")
    if code.scheduler is not None:
        folder = release / "scheduler"
        if code.replaced:
            settings = storage.read_json(folder / "scheduler_config.json")
            code.scheduler.from_config(settings).save_pretrained(folder)
        index["scheduler"] = _copy(code.scheduler, folder)
    if code.pipeline is not None:
        index["_class_name"] = _copy(code.pipeline, release)
    storage.write_text(release / "model_index.json", json.dumps(index, indent=2))


def ship_code(folder: str | Path) -> None:
    """Put our code into the folder of a saved pipeline, so that it loads where this package is not installed.

    ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` loads it then.

    Args:
        folder: What ``save_pretrained`` wrote.

    Raises:
        FileNotFoundError: If it holds no pipeline.
        ValueError: If the pipeline needs code that is not ours.
    """
    index = storage.read_json(Path(folder) / "model_index.json")
    entry, named = index.get("scheduler"), index.get("_class_name")
    if isinstance(named, list):  # it has code already, perhaps an older one's
        index["_class_name"] = named[-1]
    if isinstance(entry, list) and entry[-1] in sfumato.__all__:
        index["scheduler"] = [f"sfumato.schedulers.{entry[0].rpartition('.')[2]}", entry[-1]]
    add_custom_code(find_custom_code(index, None), Path(folder))


def ship_model_code(found: Any, folder: str | Path) -> None:
    """Put the code of a network of ours into its folder, so that it loads where this package is not installed.

    ``AutoModel.from_pretrained(folder, trust_remote_code=True)`` of diffusers loads it then.

    Args:
        found: Its class.
        folder: What ``save_pretrained`` of it wrote.
    """
    config = storage.read_json(Path(folder) / "config.json")
    config["auto_map"] = {"AutoModel": ".".join(_copy(found, Path(folder)))}
    storage.write_text(Path(folder) / "config.json", json.dumps(config, indent=2))


def _copy(found: Any, folder: Path) -> list[str]:
    """Copy a class's file and those it imports from beside it; gives the entry for the index."""
    file = Path(inspect.getfile(found))
    for source in sorted(_with_siblings(file)):
        shutil.copyfile(source, folder / source.name)
    return [file.stem, found.__name__]


def _with_siblings(file: Path) -> set[Path]:
    found: set[Path] = set()
    todo = {file}
    while todo:
        path = todo.pop()
        found.add(path)
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        siblings = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level and node.module}
        todo |= {path.with_name(f"{name}.py") for name in siblings} - found
    return found
