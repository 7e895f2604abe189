"""Names and summaries of methods, attacks and embedded models.

They are read from the sources, since to import these is to import torch, and the commands that list names, or refuse
one, are to answer at once.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

__all__ = ["attacks", "method_names", "methods", "models"]

PACKAGE = Path(__file__).parents[1]


def method_names() -> list[str]:
    """Names of the unlearning methods, in the order of `sfumato.unlearning.methods.METHODS`."""
    return list(_methods())


def methods() -> dict[str, str]:
    """Name of each unlearning method to its summary, the first line of its module."""
    found = {}
    for name, module in _methods().items():
        source = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text(encoding="utf-8")
        found[name] = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
    return found


def _methods() -> dict[str, str]:
    """Name of each method to its module."""
    table = _assigned("unlearning/methods.py", "METHODS")
    rows = zip(table.keys, table.values, strict=True)
    return {ast.literal_eval(name): ast.literal_eval(row.args[0]) for name, row in rows}


def attacks() -> dict[str, str]:
    """Name of each attack to its summary, as in `sfumato.attacks.methods.ATTACKS`."""
    table = _assigned("attacks/methods.py", "ATTACKS")
    rows = zip(table.keys, table.values, strict=True)
    return {ast.literal_eval(name): ast.literal_eval(row.args[2]) for name, row in rows}


def models() -> list[str]:
    """Names of the embedded models, as in `sfumato.loading.EMBEDDED`."""
    return list(ast.literal_eval(_assigned("loading.py", "EMBEDDED")))


def _assigned(file: str, name: str) -> Any:
    """What a module of ours assigns to a name, as a syntax tree."""
    for node in ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(one, ast.Name) and one.id == name for one in node.targets):
            return node.value
    raise LookupError(f"{file} assigns no {name}.")
