"""Command lines from dataclasses: `transformers.HfArgumentParser`, with help taken from the docstrings."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, get_args, get_type_hints

from transformers import HfArgumentParser

from sfumato.terminal import JSON_HELP, Help, Parser, examples_of

__all__ = ["make_parser"]


class _ConfigParser(Parser, HfArgumentParser):
    """Of dataclasses, with errors in one sentence."""


class _Json(argparse.Action):
    """Stands in the help: `sfumato.terminal.run` takes the option, but not its abbreviations, off the command line."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error("write --json in full")


def make_parser(
    *classes: Any, description: str | None = None, program: str | None = None, examples: Sequence[str] = ()
) -> HfArgumentParser:
    """Make a parser for config dataclasses.

    Args:
        *classes: Dataclasses whose docstrings describe the fields under ``Attributes:``. A field that is a number or
            None takes ``none`` too.
        description: Shown by ``--help``.
        program: The words before the options, likewise; None takes the process's name.
        examples: Commands, likewise.

    Returns:
        The parser; ``parse_args_into_dataclasses`` gives one object a class.
    """
    make: Any = _ConfigParser  # which a type checker takes for argparse's
    parser = make(classes, description=description, prog=program, epilog=examples_of(examples), formatter_class=Help)
    parser.add_argument("--json", action=_Json, nargs=0, default=argparse.SUPPRESS, help=JSON_HELP)
    described = {name: text for cls in classes for name, text in _attribute_texts(cls).items()}
    numbers = {name: kind for cls in classes for name, kind in _optional_numbers(cls).items()}
    for action in parser._actions:
        if action.dest in described and not action.help:
            action.help = described[action.dest].replace("%", "%%")
        if action.dest in numbers:
            action.type = _or_none(numbers[action.dest])
    return parser


def _or_none(convert: Callable[[str], float]) -> Callable[[str], float | None]:
    """Read a number, or the word none; named as the number is, since argparse says "invalid float value"."""

    def read(text: str) -> float | None:
        return None if text.lower() == "none" else convert(text)

    read.__name__ = convert.__name__
    return read


def _optional_numbers(cls: Any) -> dict[str, Any]:
    """Fields that are a number or None, with the number's type."""
    hints = {name: get_args(hint) for name, hint in get_type_hints(cls).items()}
    return {name: kinds[0] for name, kinds in hints.items() if kinds in ((int, NoneType), (float, NoneType))}


def _attribute_texts(cls: Any) -> dict[str, str]:
    """Texts of the class and of those it inherits from."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        entries = re.findall(r"^    (\w+): (.+?)(?=^    \w+: |\Z)", section, re.MULTILINE | re.DOTALL)
        texts |= {name: " ".join(text.split()) for name, text in entries}
    return texts
