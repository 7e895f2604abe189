"""Command lines from dataclasses: `transformers.HfArgumentParser`, with help taken from the docstrings."""

from __future__ import annotations

import inspect
import re
from typing import Any

from transformers import HfArgumentParser

__all__ = ["make_parser"]


def make_parser(*classes: Any, description: str | None = None) -> HfArgumentParser:
    """Make a parser for config dataclasses.

    Args:
        *classes: Dataclasses whose docstrings describe the fields under ``Attributes:``.
        description: Shown by ``--help``.

    Returns:
        The parser; ``parse_args_into_dataclasses`` gives one object a class.
    """
    parser = HfArgumentParser(classes, description=description)
    described = {name: text for cls in classes for name, text in _attribute_texts(cls).items()}
    for action in parser._actions:
        if action.dest in described and not action.help:
            action.help = described[action.dest].replace("%", "%%")
    return parser


def _attribute_texts(cls: Any) -> dict[str, str]:
    """Texts of the class and of those it inherits from."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        entries = re.findall(r"^    (\w+): (.+?)(?=^    \w+: |\Z)", section, re.MULTILINE | re.DOTALL)
        texts |= {name: " ".join(text.split()) for name, text in entries}
    return texts
