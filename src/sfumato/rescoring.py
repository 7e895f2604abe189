"""Counting again what was found: an evaluation's or an attack's output folder by another rule; nothing is drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato import storage, terminal
from sfumato.attacks import results
from sfumato.evaluation import evaluate, job
from sfumato.evaluation.detectors import Rule

__all__ = ["main"]


def main(
    folders: Sequence[str],
    *,
    labels: Sequence[str] | None = None,
    threshold: float | None = None,
    top: int | None = None,
    output: str | None = None,
) -> terminal.Answer:
    """Count again.

    Args:
        folders: The output folder of an evaluation, or of one or several attacks on the same prompts, which are then
            counted together: a prompt counts if any of them brought the concept back.
        labels: What the detector must have found, any of these; by default as before.
        threshold: Least score of a finding; by default as before.
        top: Highest rank of a finding, 0 for any; by default as before.
        output: A new file for the result, of the form of evaluation.json or attack.json.

    Returns:
        The figures.

    Raises:
        FileNotFoundError: If a folder holds no finished evaluation or attack.
        FileExistsError: If the file exists.
        ValueError: If a folder is damaged, the rule is impossible, or the attacks can't be counted together.
    """
    if output is not None and Path(output).exists():
        raise FileExistsError(f"{output} exists; choose another file.")

    def moved(stored: Any) -> Rule:
        try:
            rule = Rule(tuple(tuple(one) for one in stored["wanted"]), stored["threshold"], stored["top"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"The rule in {folders[0]} is damaged ({type(error).__name__}: {error}).") from error
        changes: dict[str, Any] = {} if labels is None else {"wanted": tuple((label,) for label in labels)}
        changes |= {} if threshold is None else {"threshold": threshold}
        changes |= {} if top is None else {"top": top or None}
        return replace(rule, **changes)

    by = {"labels": labels, "threshold": threshold, "top": top}
    evaluated = Path(folders[0]) / evaluate.RESULT_FILE
    if len(folders) == 1 and evaluated.is_file():
        before = storage.read_json(evaluated)
        found = evaluate.rescore(folders[0], moved(before.get("detector", {}).get("rule")))
        counted_again = {**found.as_dict(), **_origin([before], before["detector"]["rule"], by)}
        _write(output, {**before, **counted_again})
        return terminal.Answer({"output": output, **counted_again}, job.summary(found))
    counted = [results.read_audit(folder) for folder in folders]
    counted = [results.rescore(one, moved(one.rule)) for one in counted]
    together = results.union(counted) if len(counted) > 1 else counted[0]
    stored = [storage.read_json(Path(folder) / results.RESULT_FILE) for folder in folders]
    counted_again = {**together.as_dict(), **_origin(stored, stored[0]["rule"], by)}
    _write(output, {**stored[0], **counted_again})
    return terminal.Answer({"output": output, **counted_again}, results.summary(together))


def _origin(stored: Sequence[Mapping[str, Any]], rule: Any, by: Mapping[str, Any]) -> dict[str, Any]:
    """What a result that was counted again says of itself: the command lines of the first counts, and what changed."""
    commands = [one.get("command") for one in stored]
    return {"command": None, "rescored": {"rule": rule, "commands": commands, "by": dict(by)}}


def _write(output: str | None, found: Mapping[str, Any]) -> None:
    if output is not None:
        storage.write_text(output, json.dumps(found, indent=1))
