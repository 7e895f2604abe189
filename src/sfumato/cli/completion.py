"""``sfumato completion``: a script of the whole command line for a shell, by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from sfumato.cli import catalogue
from sfumato.cli.parser import make_parser

__all__ = ["script"]

FILES = {"boundary", "config", "evaluation", "image", "images", "mask", "pairs", "prompts", "recipe"}
FOLDERS = {"cache", "folders", "forget_images", "output", "real", "result", "retain_images"}
MODELS = {"base", "model", "original"}


def script(shell: str) -> str:
    """Write the script.

    Args:
        shell: ``bash``, ``zsh`` or ``tcsh``.

    Raises:
        ImportError: If shtab is missing.
    """
    try:
        import shtab
    except ImportError as error:
        raise ImportError("Completion needs shtab: run pip install 'sfumato[completion]'.") from error
    parser = make_parser(whole=True)
    models = _words("_sfumato_models_or_dirs", catalogue.models(), folders=True)
    lists = {
        "methods": _words("_sfumato_methods", catalogue.method_names()),
        "attacks": _words("_sfumato_attacks", list(catalogue.attacks())),
    }
    for command, action in _actions(parser):
        name: Any = action.dest
        if len(action.option_strings) > 1 and name != "help":  # --a_b and --a-b are one option
            action.option_strings = action.option_strings[:1]
        known = (
            models if name in MODELS else shtab.FILE if name in FILES else shtab.DIRECTORY if name in FOLDERS else None
        )
        if name in lists:  # a release takes files of attacks
            known = lists[name] if command == "benchmark" else shtab.FILE
        if known is not None and not action.choices:
            action.complete = known  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell))


def _actions(parser: argparse.ArgumentParser, command: str = "") -> Iterator[tuple[str, argparse.Action]]:
    """All arguments of a parser and of those below it, each with its command."""
    for action in parser._actions:
        yield command, action
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from _actions(below, command or name)


def _words(name: str, words: Sequence[str], *, folders: bool = False) -> dict[str, Any]:
    """Complete one of some words, or a folder."""
    listed = " ".join(words)
    bash = f'{name}() {{\n  compgen -W "{listed}" -- "$1"\n' + ('  compgen -d -- "$1"\n' if folders else "") + "}"
    zsh = f"{name}() {{\n  compadd -- {listed}\n" + ("  _files -/\n" if folders else "") + "}"
    return {"bash": name, "zsh": name, "tcsh": f"({listed})", "preamble": {"bash": bash, "zsh": zsh}}
