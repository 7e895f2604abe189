"""Recipes: settings that are known to work, as YAML files in ``training/configs``.

A recipe is a flat mapping of settings for one method; ``expected`` in it says what came of them on the embedded model,
as ranges in percent. That model finds its recipe by the kind of concept (``salun-atelier-style.yaml``), so
``sfumato.unlearn(pipe, "sketch")`` needs no settings at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from diffusers import DiffusionPipeline

from sfumato import concepts

__all__ = ["Recipe", "find_recipe", "read_recipe"]


@dataclass(frozen=True)
class Recipe:
    """What a file says.

    Attributes:
        settings: Setting to value.
        name: Where they come from; empty if there is no recipe.
        expected: Figure (``ua``, ``ira``, ``cra``) to the range in which it is expected, in percent.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    name: str = ""


def find_recipe(
    method: str, pipe: DiffusionPipeline | None, forget: str | Sequence[str], recipe: str | Path | None = None
) -> Recipe:
    """Find the recipe for a method on a model.

    Args:
        method: The unlearning method.
        pipe: The model; one with a vocabulary may have recipes of its own.
        forget: What it is to forget.
        recipe: A YAML file, or the name of a shipped recipe such as ``"salun-atelier-style"``; None looks for the
            model's.

    Returns:
        The recipe; empty if there is none, so that the method's own defaults apply.

    Raises:
        FileNotFoundError: If `recipe` is given and is neither a file nor a shipped recipe.
        ValueError: If it is malformed or of another method.
    """
    shipped = files("sfumato.training") / "configs"
    if recipe is None:
        vocabulary = concepts.vocabulary_of(pipe) if pipe is not None else None
        if vocabulary is None:
            return Recipe()
        path = shipped / f"{method}-{vocabulary.name}-{concepts.kind_of(vocabulary, forget)}.yaml"
        return read_recipe(str(path), method) if path.is_file() else Recipe()
    if Path(recipe).is_file():
        return read_recipe(recipe, method)
    path = shipped / f"{recipe}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(Path(str(entry)).stem for entry in shipped.iterdir() if entry.name.endswith(".yaml")))
        raise FileNotFoundError(
            f"There is no recipe {recipe}: neither a YAML file nor one of those shipped ({names})."
        )
    return read_recipe(str(path), method)


def read_recipe(path: str | Path, method: str) -> Recipe:
    """Read a recipe and check that it is one for `method`; see `find_recipe`."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} is not a recipe: it must map settings to values.")
    settings = dict(content)
    named = settings.pop("method", method)
    if named != method:
        raise ValueError(f"{path} is a recipe for {named}, not for {method}.")
    expected = _ranges(path, settings.pop("expected", {}))
    return Recipe(settings, expected, Path(path).stem)


def _ranges(path: str | Path, stated: Any) -> dict[str, tuple[float, float]]:
    """The ranges that a recipe expects, each two numbers in rising order."""
    ranges = {}
    for name, ends in stated.items() if isinstance(stated, Mapping) else [("", stated)]:
        numbers = isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends)
        if not numbers or not name or ends[0] > ends[1]:
            raise ValueError(f"{path}: `expected` must map figures to ranges such as [95, 100], got {stated!r}.")
        ranges[str(name)] = (float(ends[0]), float(ends[1]))
    return ranges
