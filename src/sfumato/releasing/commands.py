"""The commands that repeat a run and its audits in the folder of the release, without paths of whoever ran them."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sfumato.arguments import make_parser
from sfumato.attacks.audit import AuditConfig
from sfumato.attacks.job import AttackJob
from sfumato.attacks.methods import ATTACKS
from sfumato.evaluation.evaluate import EvaluationConfig
from sfumato.evaluation.job import EvaluationJob
from sfumato.releasing.base import HUB_ID, Base

__all__ = [
    "MACHINE", "AuditCommand", "audit_command", "file_name", "recipe_of", "rescore_command", "unlearn_command",
    "without_folders",
]  # fmt: skip

MACHINE = ("cache", "device", "resume")
"""Options that are a matter of the machine, or of how a run went."""

_FILES = ("prompts", "pairs", "real")
_NETWORKS = ("clip", "classifier", "dinov2")
_FOLDER = re.compile(r"[/\\]|^~")


class AuditCommand(NamedTuple):
    """The command line of an evaluation or attack.

    Attributes:
        line: It.
        brought: The options that name what is not part of the release.
    """

    line: str
    brought: tuple[str, ...]


def recipe_of(manifest: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Give the run's settings as a recipe.

    Args:
        manifest: What was done.

    Returns:
        The YAML, and the settings that name a file or folder, of which only the last part is told: the rest is a
        matter of the machine that the run was on.
    """
    settings, local = {}, []
    for name, value in manifest["settings"].items():
        if isinstance(value, str) and _FOLDER.search(value):
            local.append(name)
            value = file_name(value)
        settings[name] = value
    return yaml.safe_dump({"method": manifest["method"], **settings}, sort_keys=False, allow_unicode=True), local


def file_name(path: str) -> str:
    """Give the last part of a path, as any system writes it."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def unlearn_command(manifest: Mapping[str, Any], base: Base) -> str:
    """Give the command that repeats the run, from the folder of the release."""
    dtype = str(manifest.get("dtype", "float32")).removeprefix("torch.")
    asked = manifest.get("asked", {})
    phrases = manifest["concept"].get("phrases") or [manifest["forget"]]
    processes = int(manifest.get("processes", 1))
    program = f"accelerate launch --num_processes {processes} -m sfumato.cli" if processes > 1 else "sfumato"
    words = [program, "unlearn", _quoted(str(manifest["method"])), _option("forget", phrases)]
    words += [_option(name, value) for name in ("anchor", "retain") if (value := asked.get(name)) is not None]
    words += [_option("model", base.name), f"--dtype {dtype}", "--recipe recipe.yaml", "--output again"]
    return " ".join(words)


def audit_command(stated: Any, *, model: str, original: str | None, output: str) -> AuditCommand | None:
    """Turn the command line of an evaluation or attack into one for the folder of the release.

    It is read by the command's own parser and written anew, so that nothing in it can be another command.

    Args:
        stated: What evaluation.json or attack.json says.
        model: The result to audit.
        original: What to name as the model before; None names none.
        output: The folder to write into.

    Returns:
        The command; None if what was stated is none.
    """
    program, given = _parsed(stated)
    if not program:
        return None
    kept = {name: value for name, value in given.items() if name not in ("model", "original", "output", *MACHINE)}
    brought = tuple(name for name, value in kept.items() if without_folders(name, value)[1])
    kept = {name: without_folders(name, value)[0] for name, value in kept.items()}
    named = {"model": model, "forget": kept.pop("forget"), **({} if original is None else {"original": original})}
    words = [_option(name, value) for name, value in {**named, **kept, "output": output}.items()]
    return AuditCommand(" ".join([*program, *words]), brought)


def rescore_command(by: Any, folders: Sequence[str], output: str) -> str | None:
    """Give the command that counts audits again.

    Args:
        by: The rule's changes, as a result that was counted again states them: labels, threshold and top.
        folders: Of the audits.
        output: The file to write.

    Returns:
        The command; None if what was stated are no such changes.
    """
    kinds = {"labels": list, "threshold": int | float, "top": int}
    if not isinstance(by, Mapping) or set(by) - set(kinds):
        return None
    given = {name: value for name, value in by.items() if value is not None}
    if not all(isinstance(value, kinds[name]) for name, value in given.items()):
        return None
    options = [_option(name, value) for name, value in {**given, "output": output}.items()]
    return " ".join(["sfumato rescore", *map(_quoted, folders), *options])


def _parsed(stated: Any) -> tuple[list[str], dict[str, Any]]:
    """The words before the options, and the options that are given; no words if it is no command line of an audit."""
    try:
        words = shlex.split(str(stated or ""))
    except ValueError:
        return [], {}
    classes: tuple[type[Any], ...]
    if words[:2] == ["sfumato", "evaluate"]:
        program, classes = words[:2], (EvaluationJob, EvaluationConfig)
    elif words[:2] == ["sfumato", "attack"] and words[2:] and words[2] in ATTACKS:
        program, classes = words[:3], (AttackJob, ATTACKS[words[2]].config, AuditConfig)
    else:
        return [], {}
    parser, absent = make_parser(*classes), object()
    parser.set_defaults(**{field.name: absent for kind in classes for field in fields(kind)})
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            found = parser.parse_args(words[len(program) :])
    except SystemExit:
        return [], {}
    return program, {name: value for name, value in vars(found).items() if value is not absent}


def without_folders(name: str, value: Any) -> tuple[Any, bool]:
    """Take the folders of this machine out of an option.

    Args:
        name: The option's, or that of the entry of a result which says the same.
        value: Its value.

    Returns:
        The value, of which a file or folder keeps its name alone; and whether it names what a reader has to bring.
    """
    if not isinstance(value, str):
        return value, False
    if name in _FILES:
        return file_name(value), True
    if name in ("clip", "model"):
        return _network(value)
    kind, colon, rest = value.partition(":")
    if name not in ("detector", "features") or not colon or kind == "nudenet":
        return value, False
    if kind not in _NETWORKS:
        return value, True  # a function of the user's own
    network, brought = _network(rest)
    return f"{kind}:{network}", brought


def _network(named: str) -> tuple[str, bool]:
    """A network's Hub id as it is, of its folder the name."""
    public = HUB_ID.fullmatch(named) and not named.startswith(".") and not Path(named).exists()
    return (named, False) if public else (file_name(named), True)


def _quoted(text: str) -> str:
    """Quote for bash; what can't be seen is written as its number, since it could make a command look like another."""
    if text.isprintable():
        return shlex.quote(text)
    plain = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in plain) + "'"


def _option(name: str, value: Any) -> str:
    """An option for a shell; a value that begins with a dash is not taken for another option."""
    if value is True:
        return f"--{name}"
    given: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
    values = ["none" if each is None else str(each) for each in given]
    if len(values) == 1 and values[0].startswith("-"):
        return f"--{name}={_quoted(values[0])}"
    return f"--{name} {' '.join(_quoted(each) for each in values)}"
