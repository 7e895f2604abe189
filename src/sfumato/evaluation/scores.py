"""From what a detector found to UA, IRA, CRA and neighbours, so that a rule can be moved after the pictures are drawn.

See `sfumato.evaluation.unlearning` for the accuracies. Here they are of any model: the concept is told by a rule, and
what else a picture should show by which label of a detector's group ranks first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato import storage
from sfumato.evaluation.detectors import Finding, Rule
from sfumato.evaluation.metrics import wilson
from sfumato.evaluation.pictures import Request

__all__ = ["FINDINGS_FILE", "Sighting", "read_sightings", "tally", "write_sightings"]

FINDINGS_FILE = "findings.jsonl"


@dataclass(frozen=True)
class Sighting:
    """A picture, what it should show, and what a detector found.

    Attributes:
        model: ``"result"`` or ``"original"``.
        kind: ``"forget"``, ``"retain"`` or ``"neighbour"``.
        request: Its prompt and seed.
        words: A detector's group to the label that should rank first in it; empty if nothing is known.
        findings: What was found.
    """

    model: str
    kind: str
    request: Request
    words: Mapping[str, str] = field(default_factory=dict)
    findings: Sequence[Finding] = ()

    def right(self, group: str) -> bool | None:
        """Whether the label that should ranks first in a group; None if the detector has no such group."""
        of_group = [found for found in self.findings if found.group == group]
        if group not in self.words or not of_group:
            return None
        return max(of_group, key=lambda found: found.score).label == self.words[group]


def tally(sightings: Sequence[Sighting], rule: Rule, groups: Sequence[str]) -> dict[str, Any]:
    """Count what the pictures of one model show.

    Args:
        sightings: Of all its pictures.
        rule: Tells the concept.
        groups: The concept's own groups; a vocabulary's domains.

    Returns:
        ``ua``; ``ira`` and ``cra``, None where the detector can't tell; and ``neighbours``, the share of the other
        words' pictures that show them, all as plain values with their Wilson intervals.
    """
    forget = [not rule(seen.findings) for seen in sightings if seen.kind == "forget"]
    kept = [seen for seen in sightings if seen.kind == "retain" and seen.words]
    others = list(dict.fromkeys(group for seen in kept for group in seen.words if group not in groups))
    neighbours: dict[str, list[bool]] = {}
    for seen in sightings:
        for group in groups if seen.kind != "forget" else ():
            hit = seen.right(group)
            if hit is not None:
                neighbours.setdefault(seen.words[group], []).append(hit)
    return {
        "ua": _share(forget),
        "ira": _share(_all_right(kept, groups)),
        "cra": _share(_all_right(kept, others)) if others else None,
        "neighbours": {word: _share(hits) for word, hits in neighbours.items()},
    }


def _all_right(sightings: Sequence[Sighting], groups: Sequence[str]) -> list[bool]:
    hits = [[seen.right(group) for group in groups] for seen in sightings]
    return [all(row) for row in hits if row and None not in row]


def _share(hits: Sequence[bool]) -> dict[str, float | int] | None:
    return wilson(sum(hits), len(hits)).as_dict() if hits else None


def write_sightings(folder: Path, sightings: Sequence[Sighting]) -> None:
    """Write ``findings.jsonl``, a line a picture."""
    lines = [
        json.dumps(
            {
                "model": seen.model, "kind": seen.kind, "prompt": seen.request.prompt, "seed": seen.request.seed,
                "words": dict(seen.words), "findings": [found.as_dict() for found in seen.findings],
            }
        )
        for seen in sightings
    ]  # fmt: skip
    storage.write_text(folder / FINDINGS_FILE, "\n".join(lines) + "\n")


def read_sightings(folder: str | Path) -> list[Sighting]:
    """Read what `write_sightings` wrote.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.
    """
    path = Path(folder) / FINDINGS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {FINDINGS_FILE}: name the output folder of an evaluation.")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [
            Sighting(
                row["model"], row["kind"], Request(row["prompt"], tuple(row["seed"])), row["words"],
                [Finding.from_dict(found) for found in row["findings"]],
            )
            for row in rows
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); evaluate again.") from error
