"""The model that a result was made from: what the card calls it, and the licence that the result inherits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache

from sfumato import loading

__all__ = ["BASE_FOLDER", "HUB_ID", "Base", "find_base", "licence_of", "own_licence"]

BASE_FOLDER = "base"
"""Where a release holds the original, if that ships with this package alone."""

_LICENCE_FIELDS = ("license", "license_name", "license_link")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Base:
    """The original model.

    Attributes:
        name: An embedded model, a Hub id, or the name of a local folder.
        folder: Where it is; None if it is on the Hub.
        licence: What its own card says: ``license`` and, of one of its own kind, ``license_name``, ``license_link``.
    """

    name: str
    folder: Path | None
    licence: Mapping[str, str] = field(default_factory=dict)

    @property
    def embedded(self) -> bool:
        """Whether it ships with this package."""
        return self.name in loading.EMBEDDED

    def carried_by(self, formats: Sequence[str]) -> bool:
        """Whether a release of these formats holds the original: without this package nobody else has it."""
        return self.embedded and list(formats) != ["full"]

    @property
    def public(self) -> bool:
        """Whether others find it under its name."""
        return self.embedded or (self.folder is None and HUB_ID.fullmatch(self.name) is not None)


def find_base(stated: str | None, given: str | Path | None) -> Base:
    """Find the original model and its licence.

    Args:
        stated: What the manifest calls it.
        given: What the user says it is: an embedded model, a folder or a Hub id.

    Returns:
        The model.

    Raises:
        ValueError: If nothing says what it is.
    """
    named = str(given) if given is not None else stated
    if not named or not named.strip():
        raise ValueError("The manifest does not say which model was unlearned: name it with `base` (--base).")
    if named in loading.EMBEDDED:
        folder = loading.assets_folder() / named
        return Base(named, folder, _licence_in(folder / "README.md"))
    if given is not None and Path(given).is_dir():
        folder = Path(given)
        return Base(folder.resolve().name, folder, _licence_in(folder / "README.md"))
    cached = try_to_load_from_cache(named, "README.md") if HUB_ID.fullmatch(named) else None
    return Base(named, None, _licence_in(Path(cached)) if isinstance(cached, str) else {})


def _licence_in(card: Path) -> dict[str, str]:
    if not card.is_file():
        return {}
    try:
        data: Any = ModelCard.load(card, ignore_metadata_errors=True).data
    except Exception:  # a card that can't be read says nothing of its licence; the user is asked for it
        return {}
    return {name: str(value) for name in _LICENCE_FIELDS if (value := getattr(data, name, None))}


def licence_of(base: Base, given: str | None) -> dict[str, str]:
    """Say what the result's licence is.

    Args:
        base: The original, from which it is inherited.
        given: What the user says it is.

    Returns:
        The fields of the card.

    Raises:
        ValueError: If there is no saying, or it is no identifier of a licence.
    """
    if given is None and "license" not in base.licence:
        raise ValueError(
            f"The licence of {base.name!r} could not be found: it has no card here that states one. Look it up and "
            "give it with `license` (--license), for instance creativeml-openrail-m."
        )
    if given is None:
        return dict(base.licence)
    return {"license": _checked(given)}


def own_licence(given: str | None) -> str:
    """Say what the licence of a network is that the user has trained: what the user says.

    Raises:
        ValueError: If that is nothing, or no identifier of a licence.
    """
    if given is None:
        raise ValueError("A model of your own has no base whose licence it inherits: state one with `license`.")
    return _checked(given)


def _checked(given: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", given):
        raise ValueError(f"`license` must be an identifier such as apache-2.0 or other, got {given!r}.")
    return given
