"""The settings of a training job as a release tells them: without the places of whoever trained it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sfumato.loading import EMBEDDED
from sfumato.releasing.base import HUB_ID
from sfumato.releasing.commands import file_name

__all__ = ["recipe_of_settings", "without_places"]

_PLACES = ("model", "data", "data_dir", "held_out", "vae", "distance")
"""Settings that may name a folder of whoever trained it."""


def recipe_of_settings(settings: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Give a job's settings as a file for ``--config``, and those that name files of whoever trained it.

    Args:
        settings: Of each config, or None, as ``manifest.json`` has them.
    """
    flat = {name: value for part in settings.values() if part is not None for name, value in part.items()}
    brought = tuple(name for name in _PLACES if _is_place(name, flat.get(name)))
    told = {name: file_name(value) if name in brought else value for name, value in flat.items()}
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True), brought


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give a job's settings with the last part alone of folders and files of whoever trained it."""
    return {
        part: None if given is None
        else {k: file_name(v) if k in _PLACES and _is_place(k, v) else v for k, v in given.items()}
        for part, given in settings.items()
    }  # fmt: skip


def _is_place(name: str, value: Any) -> bool:
    """Whether a setting names a folder or file of whoever trained it, and neither an embedded model nor the Hub's."""
    if not isinstance(value, str) or value in ("atelier", *EMBEDDED):
        return False
    if name == "distance":
        return ":" in value and value.partition(":")[0] != "lpips"
    return (
        name in ("data_dir", "held_out")
        or value.startswith(".")
        or not HUB_ID.fullmatch(value)
        or Path(value).is_dir()
    )
