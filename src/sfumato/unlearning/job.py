"""Unlearning as one job: what every script in ``training/`` that unlearns does with its command line."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sfumato import concepts, loading, recipes, storage, terminal
from sfumato.arguments import make_parser
from sfumato.trainer import checkpoints
from sfumato.unlearning.core import rehearse, unlearn
from sfumato.unlearning.methods import configure, method_named

__all__ = ["JobConfig", "main", "make_job_parser", "run"]


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


def make_job_parser(method: str, program: str | None = None, examples: Sequence[str] = ()) -> Any:
    """Make the parser of a method's command line; see `sfumato.arguments.make_parser`."""
    chosen = method_named(method)
    return make_parser(
        JobConfig, *chosen.configs, description=chosen.summary, program=program, examples=examples
    )  # fmt: skip


def main(method: str, arguments: Sequence[str] | None = None) -> None:
    """Run an unlearning job from the command line of a script.

    Args:
        method: The unlearning method.
        arguments: The command line; None takes the process's own.
    """
    terminal.run(lambda words: run(method, words, terminal.script()), arguments)


def run(method: str, arguments: Sequence[str], program: str = "", examples: Sequence[str] = ()) -> terminal.Answer:
    """Run an unlearning job from a command line.

    Values come from, in rising order: the configs' defaults, the recipe, the command line.

    Args:
        method: The unlearning method.
        arguments: The command line.
        program: The words before it, to say how the job is resumed; none if they are not known.
        examples: For ``--help``.

    Returns:
        What was made: the manifest, or the plan of a dry run.
    """
    chosen = method_named(method)
    parser = make_job_parser(method, program or None, examples)
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
        return terminal.Answer(plan.as_dict(), str(plan))
    folder = storage.check_output_dir(job.output, resume=job.resume)
    with terminal.resumable(folder, program, arguments, resume=job.resume, kept=lambda: checkpoints.newest(folder)):
        unlearn(pipe, job.forget, method, **asked, resume=job.resume, verify=job.verify, **settings)
    return _made(job, folder)


def _made(job: JobConfig, folder: Path) -> terminal.Answer:
    """What the job's folder says, and how to look whether it is true."""
    if not terminal.is_first():  # who comes first may still be writing
        return terminal.Answer({})
    manifest = storage.read_json(folder / "manifest.json")
    facts = {name: value for name, value in manifest.items() if name != "concept"}  # which is all its prompts
    following = ["sfumato", "evaluate", "--model", str(folder), "--forget", *job.forget]
    return terminal.Answer(
        {"output": str(folder), **facts},
        f"result {folder}, which forgot {manifest['forget']}; its manifest.json says how",
        shlex.join([*following, "--output", f"{folder}-evaluated"]),
    )
