"""Evaluation as one job: what ``sfumato evaluate`` does with its command line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sfumato import terminal
from sfumato.arguments import make_parser
from sfumato.evaluation.evaluate import RESULT_FILE, Evaluation, EvaluationConfig, evaluate

__all__ = ["EvaluationJob", "main", "make_job_parser", "summary"]


@dataclass
class EvaluationJob:
    """What to evaluate.

    Attributes:
        model: The unlearned model: a job's output folder, in any format, an embedded model or a Hub id.
        forget: What was forgotten: one phrase or several.
        output: Folder for evaluation.json, findings.jsonl and pictures; another evaluation is never overwritten.
        original: The model before; by default the one that the result's manifest names.
        resume: Continue an evaluation that was cut short.
    """

    model: str
    forget: list[str] = field(metadata={"nargs": "+"})
    output: str = field()
    original: str | None = None
    resume: bool = False


def make_job_parser(examples: Sequence[str] = ()) -> Any:
    """Make the parser of the command line; see `sfumato.arguments.make_parser`."""
    return make_parser(
        EvaluationJob, EvaluationConfig, description="Measure what a model forgot, and what it kept.",
        program="sfumato evaluate", examples=examples,
    )  # fmt: skip


def main(arguments: Sequence[str], examples: Sequence[str] = ()) -> terminal.Answer:
    """Run an evaluation from a command line.

    Args:
        arguments: The command line.
        examples: For ``--help``.

    Returns:
        What it found.
    """
    job, config = make_job_parser(examples).parse_args_into_dataclasses(list(arguments))
    with terminal.resumable(job.output, "sfumato evaluate", arguments, resume=job.resume):
        found = evaluate(
            job.model, job.original, forget=job.forget, output_dir=job.output, resume=job.resume,
            command=shlex.join(["sfumato", "evaluate", *arguments]), **asdict(config),
        )  # fmt: skip
    file, folder = Path(job.output) / RESULT_FILE, Path(job.output)
    following = ["sfumato", "attack", "unlearndiffatk", "--model", job.model, "--forget", *job.forget]
    if job.original is not None:
        following += ["--original", job.original]
    following += ["--output", f"{folder}-attacked"]
    return terminal.Answer(
        {"output": str(folder), **found.as_dict()}, f"{summary(found)}\n{file}", shlex.join(following)
    )


def summary(found: Evaluation) -> str:
    """Lay the main figures out as text: a row each, the original beside the result."""
    names: list[str] = [name for name in ("original", "result") if name in found.scores]
    rows: dict[str, list[str]] = {"": list(names)}
    for label in ("ua", "ira", "cra"):
        rows[label.upper()] = [_share(found.scores[name][label]) for name in names]
    for word in found.scores["result"]["neighbours"]:
        rows[f"  {word}"] = [_share(found.scores[name]["neighbours"].get(word)) for name in names]
    for pair, values in found.distances.items():
        if " to " in pair:
            rows[f"distance, {pair}"] = [_figure(values["frechet"])]
    for kind, values in found.distances.get("drift", {}).items():
        rows[f"drift, {kind}"] = [_figure(values)]
    width = max(map(len, rows))
    lines = (f"{name:{width}}  {'  '.join(f'{cell:24}' for cell in cells)}" for name, cells in rows.items())
    return "\n".join(line.rstrip() for line in lines)


def _share(share: Mapping[str, Any] | None) -> str:
    if share is None:
        return "-"
    return "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * share[name] for name in ("value", "low", "high")))


def _figure(values: Mapping[str, float]) -> str:
    return "{value:.3g} [{low:.3g}, {high:.3g}]".format(**values)
