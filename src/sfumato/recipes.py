"""Recipes: settings that are known to work, as YAML files in ``training/configs``.

A recipe is a flat mapping of settings for one method, and may say which model it is for. Embedded models find theirs
by name (``salun-atelier.yaml``), so ``sfumato.unlearn(pipe, "sneaker")`` needs no settings at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from diffusers import DiffusionPipeline

from sfumato import concepts

__all__ = ["read_recipe", "settings_for"]


def settings_for(method: str, pipe: DiffusionPipeline | None, recipe: str | Path | None = None) -> dict[str, Any]:
    """Find the settings for a method on a model.

    Args:
        method: The unlearning method.
        pipe: The model; one with a vocabulary may have a recipe of its own.
        recipe: A YAML file, or the name of a shipped recipe such as ``"salun-atelier"``; None looks for the model's.

    Returns:
        Setting to value; empty if there is no recipe, so that the method's own defaults apply.

    Raises:
        FileNotFoundError: If `recipe` is given and is neither a file nor a shipped recipe.
        ValueError: If it is malformed or of another method.
    """
    shipped = files("sfumato.training") / "configs"
    if recipe is None:
        vocabulary = concepts.vocabulary_of(pipe) if pipe is not None else None
        path = shipped / f"{method}-{vocabulary.name}.yaml" if vocabulary else None
        return read_recipe(str(path), method) if path is not None and path.is_file() else {}
    if Path(recipe).is_file():
        return read_recipe(recipe, method)
    path = shipped / f"{recipe}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(Path(str(entry)).stem for entry in shipped.iterdir() if entry.name.endswith(".yaml")))
        raise FileNotFoundError(
            f"There is no recipe {recipe}: neither a YAML file nor one of those shipped ({names})."
        )
    return read_recipe(str(path), method)


def read_recipe(path: str | Path, method: str) -> dict[str, Any]:
    """Read a recipe and check that it is one for `method`; see `settings_for`."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} is not a recipe: it must map settings to values.")
    settings = dict(content)
    named = settings.pop("method", method)
    if named != method:
        raise ValueError(f"{path} is a recipe for {named}, not for {method}.")
    return settings
