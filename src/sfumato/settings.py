"""Settings: config dataclasses that refuse a value of the wrong type in one sentence, before any long work."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["check_device", "check_ranges", "check_seed", "check_types", "nearest"]

_KINDS: dict[type, tuple[Any, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a finite number"),
    str: ((str, os.PathLike), "text"),
}


def check_types(config: Any) -> None:
    """Check the fields of a config against their annotations, for its ``__post_init__``.

    Numbers of numpy and paths become plain numbers and strings, so that JSON can hold them. Only fields that are
    declared as bool, int, float or str, or one of these or None, are looked at. A field whose metadata has
    ``choices`` takes one of these.

    Args:
        config: A dataclass instance that is not frozen.

    Raises:
        ValueError: If a value is of another type than its field, a number is NaN or infinite, or a value is none of
            its field's choices.
    """
    allowed = {field.name: field.metadata["choices"] for field in fields(config) if "choices" in field.metadata}
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        kind = next((choice for choice in choices if choice in _KINDS), None)
        if kind is not None and not (value is None and type(None) in choices):
            setattr(config, name, _checked(name, value, kind))
        if name in allowed and getattr(config, name) not in allowed[name]:
            raise ValueError(f"`{name}` must be one of {', '.join(allowed[name])}, got {value!r}.")


def check_ranges(config: Any, least: Mapping[str, float], *, positive: Sequence[str] = ()) -> None:
    """Check the numbers of a config, for its ``__post_init__``; None is in every range.

    Args:
        config: A dataclass instance.
        least: Field to the least value that it takes.
        positive: Fields that must be above 0.

    Raises:
        ValueError: If a value is out of its range.
    """
    for name, lowest in least.items():
        if getattr(config, name) is not None and getattr(config, name) < lowest:
            raise ValueError(f"`{name}` must be at least {lowest}, got {getattr(config, name)}.")
    for name in positive:
        if getattr(config, name) is not None and getattr(config, name) <= 0:
            raise ValueError(f"`{name}` must be positive, got {getattr(config, name)}.")


def nearest(name: str, known: Iterable[str]) -> str:
    """Ask whether the nearest of the known names was meant, to follow a sentence; nothing if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_seed(seed: int) -> None:
    """Raise a ValueError unless torch can take a seed."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"`seed` must be a whole number from 0 to 2^63 - 1, got {seed}.")


def check_device(device: str | None) -> None:
    """Raise a ValueError unless this machine has a device.

    Args:
        device: As torch names it, such as ``"cuda:1"``; None stands for whatever there is.
    """
    if device is None:
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise ValueError(f"`device` {device!r} can't be used here ({reason}): leave it out, or name one.") from error


def _checked(name: str, value: Any, kind: type) -> Any:
    accepted, words = _KINDS[kind]
    fits = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
    if not fits or (kind is float and not math.isfinite(value)):
        quoted = "; write it without quotes" + (", and in YAML with a point, as in 1.0e-5" if kind is float else "")
        hint = quoted if isinstance(value, str) else ""
        raise ValueError(f"`{name}` must be {words}, got {value!r}{hint}.")
    return os.fspath(value) if kind is str else kind(value)
