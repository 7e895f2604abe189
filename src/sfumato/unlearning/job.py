"""Unlearning as one job: what every script in ``training/`` that unlearns does with its command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from sfumato import concepts, loading, recipes
from sfumato.arguments import make_parser
from sfumato.trainer import process_group
from sfumato.unlearning.core import rehearse, unlearn
from sfumato.unlearning.methods import configure, method_named

__all__ = ["JobConfig", "main"]


@dataclass
class JobConfig:
    """What to unlearn, and where the result goes.

    Attributes:
        forget: What to forget: one phrase or several.
        output: Folder for the result; a finished model in it is never overwritten.
        model: An embedded model, a local folder or a Hub id.
        dtype: What to load the model in; in half precision, with a `mixed_precision` to match, weights that are not
            trained stay so.
        anchor: What to show instead of the concept.
        retain: Prompts that must keep their meaning.
        recipe: A YAML file of settings, or the name of a shipped recipe.
        resume: Continue a run that was cut short.
        verify: Check at the end whether the concept is gone and what happened to its neighbours, and say so.
        dry_run: Only say what would be trained, and the memory and time that it would take.
    """

    forget: list[str] = field(metadata={"nargs": "+"})
    output: str = field()
    model: str = "atelier"
    dtype: str = field(default="float32", metadata={"choices": ["float32", "bfloat16", "float16"]})
    anchor: str | None = None
    retain: list[str] | None = field(default=None, metadata={"nargs": "+"})
    recipe: str | None = None
    resume: bool = False
    verify: bool = True
    dry_run: bool = False


def main(method: str, arguments: Sequence[str] | None = None) -> None:
    """Run an unlearning job from a command line.

    Values come from, in rising order: the configs' defaults, the recipe, the command line.

    Args:
        method: The unlearning method.
        arguments: The command line; None takes the process's own.
    """
    chosen = method_named(method)
    parser = make_parser(JobConfig, *chosen.configs, description=chosen.summary)
    try:
        early = parser.parse_known_args(arguments)[0]
        pipe = loading.load(early.model, dtype=getattr(torch, early.dtype))
        concepts.resolve(pipe, early.forget, anchor=early.anchor, retain=early.retain)  # says what is wrong with it
        recipe = recipes.find_recipe(method, pipe, early.forget, early.recipe)
        configure(chosen.configs, recipe.settings)  # says what is wrong with it
        parser.set_defaults(**recipe.settings)
        job, *configs = parser.parse_args_into_dataclasses(arguments)
        settings = {name: value for config in configs for name, value in asdict(config).items()}
        asked = {"anchor": job.anchor, "retain": job.retain, "output_dir": job.output, "recipe": job.recipe}
        if job.dry_run:
            plan = rehearse(pipe, job.forget, method, **asked, verify=job.verify, **settings)
            group = process_group()
            if group is None or group.is_main_process:
                print(plan)
        else:
            unlearn(pipe, job.forget, method, **asked, resume=job.resume, verify=job.verify, **settings)
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        sys.exit(f"error: {error}")
