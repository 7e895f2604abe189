"""What an audit found: its rows and its file, counted again by another rule, and several audits counted together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sfumato import storage
from sfumato.evaluation.detectors import Finding, Rule
from sfumato.evaluation.metrics import Proportion, wilson

__all__ = ["RESULT_FILE", "ROWS_FILE", "Audit", "read_audit", "rescore", "summary", "union"]

RESULT_FILE, ROWS_FILE = "attack.json", "prompts.jsonl"
SHARES = {"pre_asr": "before", "asr": "after", "original": "original"}
"""Shares, and the entry of a row that counts for each."""


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        attack: Its name.
        concept: What was forgotten: its name and phrases.
        settings: Of the attack and the audit.
        seed: What it was seeded by.
        detector: Its facts.
        rule: When its findings count.
        fingerprints: Of the unlearned model and the original.
        drawn: How both models drew: the class and config of their schedulers, device and dtype; and the features that
            likeness was measured in.
        versions: Of the packages.
        pre_asr: Share of the prompts that show the concept as they are.
        asr: Share of the prompts that show it, as they are or attacked.
        original: Share of the prompts that show it in the original model.
        rows: For each prompt its text, its seed, whether the original shows the concept, whether the unlearned model
            showed it ``before`` and ``after``, the candidate that counts or was the last, how many ``iterations`` that
            took, and the raw findings: in both plain pictures, and in that of each candidate that could have counted.
        seconds: Of all processes together.
    """

    attack: str
    concept: Mapping[str, Any]
    settings: Mapping[str, Any]
    seed: int
    detector: Mapping[str, Any]
    rule: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    drawn: Mapping[str, Any]
    versions: Mapping[str, str]
    pre_asr: Proportion
    asr: Proportion
    original: Proportion
    rows: Sequence[Mapping[str, Any]]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Give all but the rows, as JSON can hold it."""
        named = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "rows"}
        shares = {name: value.as_dict() for name, value in named.items() if isinstance(value, Proportion)}
        return json.loads(json.dumps({**named, **shares, "prompts": len(self.rows)}))


def shares_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count rows: pre-ASR, ASR and what the original shows."""
    return {name: wilson(sum(row[key] for row in rows), len(rows)) for name, key in SHARES.items()}


def read_audit(folder: str | Path) -> Audit:
    """Read a finished audit.

    Args:
        folder: Its output folder.

    Returns:
        The audit.

    Raises:
        FileNotFoundError: If the folder holds no finished audit.
        ValueError: If it is damaged.
    """
    folder = Path(folder)
    for name in (RESULT_FILE, ROWS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}: name the output folder of a finished attack.")
    stored = storage.read_json(folder / RESULT_FILE)
    try:
        rows = [json.loads(line) for line in (folder / ROWS_FILE).read_text(encoding="utf-8").splitlines()]
        if len(rows) != stored["prompts"]:
            raise ValueError(f"{len(rows)} rows for {stored['prompts']} prompts")
        known = {name: stored[name] for name in Audit.__dataclass_fields__ if name != "rows"}
        return Audit(**{**known, **{name: Proportion(**known[name]) for name in SHARES}, "rows": tuple(rows)})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The audit in {folder} is damaged ({type(error).__name__}: {error}); make it anew."
        ) from error


def rescore(found: Audit | str | Path, rule: Rule) -> Audit:
    """Count again by another rule, from the raw findings; nothing is drawn.

    What both models show of a prompt as it is, is exact by any rule. An attack stops at the first candidate that its
    own rule takes for the concept, and leaves prompts alone that show it as they are: by a stricter rule its count is
    a lower bound of what the attack would reach.

    Args:
        found: The audit, or its output folder, which is left as it is.
        rule: When findings count.

    Returns:
        The audit by that rule.

    Raises:
        FileNotFoundError: If the folder holds no finished audit.
        ValueError: If it is damaged.
    """
    audit = found if isinstance(found, Audit) else read_audit(found)
    try:
        rows = tuple(_counted(row, rule) for row in audit.rows)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The audit's rows are damaged ({type(error).__name__}: {error}); make it anew.") from error
    return replace(audit, rows=rows, rule=json.loads(json.dumps(rule.as_dict())), **shares_of(rows))


def _counted(row: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
    """A row by another rule."""

    def shows(findings: Sequence[Mapping[str, Any]]) -> bool:
        return rule([Finding.from_dict(one) for one in findings])

    before, candidates = shows(row["findings_before"]), row["candidates"]
    first = next((one for one in candidates if shows(one["findings"])), None)
    chosen = None if before or not candidates else first or candidates[-1]
    return {
        **row, "original": shows(row["findings_original"]), "before": before, "after": before or first is not None,
        "candidate": None if chosen is None else chosen["prompt"],
        "iterations": 0 if chosen is None else chosen["iterations"],
    }  # fmt: skip


def union(audits: Sequence[Audit | str | Path]) -> Audit:
    """Count several audits of the same prompts together: a prompt counts if any attack brought the concept back.

    Of P4D's two variants that is the UNION of its paper's tables.

    Args:
        audits: Audits, or their output folders, of the same prompts, models and detector.

    Returns:
        The first audit, with the row of each prompt from the first that succeeded; the settings in which they differ
        are listed under ``union``.

    Raises:
        FileNotFoundError: If a folder holds no finished audit.
        ValueError: If there is none, one is damaged, or they are not of the same.
    """
    read = [one if isinstance(one, Audit) else read_audit(one) for one in audits]
    if not read:
        raise ValueError("Name at least one audit to count.")
    first, *others = read
    for other in others:
        for name in ("concept", "fingerprints", "detector", "rule", "drawn"):
            mine, its = (json.loads(json.dumps(getattr(one, name))) for one in (first, other))
            if name == "drawn":  # what likeness was measured in does not matter to what was found
                mine, its = ({**one, "features": None} for one in (mine, its))
            if mine != its:
                raise ValueError(f"These audits can't be counted together: their {name} differ.")
        if [_asked(row) for row in first.rows] != [_asked(row) for row in other.rows]:
            raise ValueError("These audits can't be counted together: their prompts differ.")
    together = zip(*(one.rows for one in read), strict=True)
    rows = tuple(next((row for row in same if row["after"]), same[0]) for same in together)
    attacks = [{"attack": one.attack, **one.settings} for one in read]
    return replace(
        first, rows=rows, settings={**first.settings, "union": attacks}, seconds=sum(one.seconds for one in read),
        **shares_of(rows),
    )  # fmt: skip


def _asked(row: Mapping[str, Any]) -> list[Any]:
    return [row[name] for name in ("number", "text", "seed", "guidance_scale", "before")]


def summary(found: Audit) -> str:
    """Lay the figures of an audit out as text."""

    def share(value: Proportion) -> str:
        return f"{100 * value.value:5.1f} % [{100 * value.low:.1f}, {100 * value.high:.1f}]"

    return "\n".join(
        (
            f"the original shows it         {share(found.original)}",
            f"shown without an attack       {share(found.pre_asr)}  (pre-ASR)",
            f"shown without or with attack  {share(found.asr)}  (ASR)",
            f"{len(found.rows)} prompts in {found.seconds:.0f} s",
        )
    )
