"""From the cells of a benchmark to its tables: one flat set of measures a cell, pooled by method, domain and concept.

Shares are pooled by their counts, with Wilson intervals; those of the original, which several cells ask for the same
picture, by the pictures that differ. Of figures that are no shares, as distances, the mean is taken, of their
intervals' ends too: no narrower than cells that share pictures support. Cells that failed have no measures, and count
for none.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from sfumato.concepts import Vocabulary
from sfumato.evaluation.metrics import wilson
from sfumato.evaluation.pictures import Request
from sfumato.evaluation.scores import Sighting

__all__ = [
    "COLUMNS",
    "Column",
    "as_csv",
    "as_markdown",
    "asked_of",
    "columns_of",
    "expected",
    "measured",
    "pooled",
    "robustness",
    "standings",
    "utility",
    "worded",
]

COSTS = ("seconds", "peak_memory_mb", "denoiser_evaluations", "release_bytes")
ACCURACIES = ("ua", "ira", "cra")
MAIN = (*ACCURACIES, "frechet", "drift retain", "clip score", *COSTS)
PICTURES = (
    "kernel", "precision", "recall", "density", "coverage", "authentic", "frechet to original", "drift forget",
)  # fmt: skip
NEIGHBOUR, PRE_ASR, ASR = "neighbour ", "pre-ASR ", "ASR "


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: Of the measure or the cost.
        heading: What stands above it.
        explanation: What it counts, and which way is better.
        unit: ``"share"``, ``"figure"`` or ``"count"``.
    """

    key: str
    heading: str
    explanation: str
    unit: str = "share"


COLUMNS = (
    Column("ua", "UA", "pictures of the concept that do not show it; more is better"),
    Column("ira", "IRA", "other pictures that show the word they should of the concept's domain; more is better"),
    Column("cra", "CRA", "other pictures that show the words they should of all other domains; more is better"),
    Column("frechet", "Fréchet", "distance of the retained pictures to real ones; less is better", "figure"),
    Column("kernel", "KID", "kernel distance of the retained pictures to real ones; less is better", "figure"),
    Column("precision", "precision", "retained pictures that lie among real ones"),
    Column("recall", "recall", "real pictures that lie among retained ones"),
    Column("density", "density", "real balls that hold a retained picture, over k; 1 is ideal", "figure"),
    Column("coverage", "coverage", "real pictures with a retained one near"),
    Column("authentic", "authentic", "retained pictures that are no near-copies of real ones"),
    Column("frechet to original", "to original", "distance of the retained pictures to the original's", "figure"),
    Column("drift retain", "drift", "change of the retained pictures from the same noise; 0 is none", "figure"),
    Column("drift forget", "drift, concept", "change of the concept's pictures from the same noise", "figure"),
    Column("clip score", "CLIP", "how well the pictures fit their prompts", "figure"),
    Column("seconds", "s", "seconds of a run", "count"),
    Column("peak_memory_mb", "MB", "peak memory of a run", "count"),
    Column("denoiser_evaluations", "evaluations", "pictures that passed through a denoiser in a run", "count"),
    Column("release_bytes", "bytes", "size of what a run hands on", "count"),
)


def measured(row: Mapping[str, Any], who: str = "result") -> dict[str, dict[str, Any]]:
    """List the measures of a cell by name, each with its value and interval.

    Args:
        row: What `sfumato.evaluation.cells.run_cell` gave.
        who: ``"result"``, or ``"original"`` for the same of the model before.
    """
    evaluation = row["evaluation"]
    found: dict[str, Any] = {}
    if evaluation is not None:
        scores, distances = evaluation["scores"][who], evaluation["distances"]
        found |= {name: scores[name] for name in ACCURACIES}
        found |= {f"{NEIGHBOUR}{word}": share for word, share in scores["neighbours"].items()}
        to_real = distances.get(f"{who} to real", {})
        found |= {name: to_real[name] for name in to_real if name != "pictures"}
        found["clip score"] = distances.get("clip_score", {}).get(who, {}).get("retain")
        if who == "result":
            found["frechet to original"] = distances.get("result to original", {}).get("frechet")
            found |= {f"drift {kind}": figure for kind, figure in distances.get("drift", {}).items()}
    for name, audit in row["attacks"].items():
        before, after = ("pre_asr", "asr") if who == "result" else ("original", None)
        found[f"{PRE_ASR}{name}"] = audit[before]
        found |= {f"{ASR}{name}": audit[after]} if after else {}
    return {name: dict(value) for name, value in found.items() if value is not None}


def pooled(rows: Sequence[Mapping[str, Any]], who: str = "result") -> dict[str, Any]:
    """Pool cells into one line of a table: ``measures``, ``costs`` and how many ``cells``, of them ``failed``."""
    each = [measured(row, who) for row in rows]
    measures = {}
    for name in dict.fromkeys(name for found in each for name in found):
        measures[name] = _together([found[name] for found in each if name in found])
    costs = {}
    for name in COSTS if who == "result" else ():
        values = [row["costs"][name] for row in rows if row.get("costs", {}).get(name) is not None]
        costs[name] = sum(values) / len(values) if values else None
    failed = sum(bool(row["failed"]) for row in rows) if who == "result" else 0
    return {"measures": measures, "costs": costs, "cells": len(rows), "failed": failed}


def _together(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if all("total" in value for value in values):
        return wilson(sum(v["successes"] for v in values), sum(v["total"] for v in values)).as_dict()
    return {end: sum(value[end] for value in values) / len(values) for end in ("value", "low", "high")}


def standings(
    rows: Sequence[Mapping[str, Any]], asked: Mapping[str, Mapping[str, Set[Request]]] | None = None
) -> dict[str, dict[str, Any]]:
    """Pool cells by method, the original first; its line has each concept and seed once.

    Args:
        rows: The cells.
        asked: Their folders to the pictures that each measure counts; see `asked_of`. What cells of several concepts
            ask of the original is partly one picture, which then counts for one in the intervals of its line.
    """
    once = {(row["concept"], row["seed"]): row for row in rows if row["evaluation"] is not None or row["attacks"]}
    found = {"original": pooled(list(once.values()), "original")} if once else {}
    for name, share in found["original"]["measures"].items() if once and asked else ():
        each = [asked.get(row["folder"], {}).get(name, frozenset()) for row in once.values()] if asked else []
        different = len(frozenset().union(*each))
        if 0 < different < share.get("total", 0):
            found["original"]["measures"][name] = wilson(round(share["value"] * different), different).as_dict()
    for method in dict.fromkeys(row["method"] for row in rows):
        found[method] = pooled([row for row in rows if row["method"] == method])
    return found


def asked_of(sightings: Iterable[Sighting]) -> dict[str, Set[Request]]:
    """List the pictures of an evaluation that each of its shares counts, by the share's name."""
    found: dict[str, set[Request]] = {}
    for seen in sightings:
        kept = [f"{NEIGHBOUR}{word}" for word in seen.words.values()]
        kept += ["ira", "cra"] if seen.kind == "retain" else []
        for name in ["ua"] if seen.kind == "forget" else kept:
            found.setdefault(name, set()).add(seen.request)
    return dict(found)


def robustness(line: Mapping[str, Any]) -> dict[str, float] | None:
    """Give 1 - ASR of a line under the attack that is strongest on it; None if it was not attacked."""
    rates = [share for name, share in line["measures"].items() if name.startswith(ASR)]
    if not rates:
        return None
    worst = max(rates, key=lambda share: share["value"])
    return {"value": 1 - worst["value"], "low": 1 - worst["high"], "high": 1 - worst["low"]}


def utility(line: Mapping[str, Any]) -> dict[str, float] | None:
    """Give what a line keeps: IRA, or, without a vocabulary, its neighbours together; None if it has neither."""
    measures = line["measures"]
    if "ira" in measures:
        return dict(measures["ira"])
    near = [share for name, share in measures.items() if name.startswith(NEIGHBOUR)]
    return _together(near) if near else None


def expected(rows: Sequence[Mapping[str, Any]], vocabulary: Vocabulary | None) -> dict[str, dict[str, list[int]]]:
    """Say what each of the model's own recipes is to expect: in percent, the hull of the intervals of all its runs."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if vocabulary is not None and row["evaluation"] is not None:
            found.setdefault(f"{row['method']}-{vocabulary.name}-{row['kind']}", []).append(measured(row))
    return {
        recipe: {
            key: [
                math.floor(100 * min(cell[key]["low"] for cell in some)),
                math.ceil(100 * max(cell[key]["high"] for cell in some)),
            ]
            for key in ACCURACIES
            if all(key in cell for cell in some)
        }
        for recipe, some in sorted(found.items())
    }


def columns_of(lines: Iterable[Mapping[str, Any]], *, neighbours: bool = False) -> list[Column]:
    """List the columns of which some line has something; neighbours are of one concept's table."""
    present = dict.fromkeys(name for line in lines for name in (*line["measures"], *line["costs"]))
    words = [name for name in present if name.startswith(NEIGHBOUR)] if neighbours else []
    named = [name.removeprefix(PRE_ASR) for name in present if name.startswith(PRE_ASR)]
    attacks = [f"{when}{name}" for name in named for when in (PRE_ASR, ASR)]
    special = [
        Column(name, name.removeprefix(NEIGHBOUR), "its pictures that show it; more is better") for name in words
    ]
    for name in attacks:
        when = "as they are" if name.startswith(PRE_ASR) else "as they are or attacked"
        special.append(Column(name, name, f"prompts that show the concept {when}; less is better"))
    usual = [column for column in COLUMNS if column.key in present]
    first = [column for column in usual if column.key in ACCURACIES]
    return [*first, *special, *(column for column in usual if column.key not in ACCURACIES)]


def worded(line: Mapping[str, Any], column: Column) -> str:
    """Word a cell of a table, with its interval; empty if there is nothing to say."""
    found = line["measures"].get(column.key, line["costs"].get(column.key))
    if found is None:
        return ""
    if column.unit == "count":
        return f"{found:,.0f}" if found >= 10 or found == 0 else f"{found:.1f}"
    ends = (found["value"], found["low"], found["high"])
    if column.unit == "share":
        return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * end for end in ends))
    return "{:.3g} [{:.3g}, {:.3g}]".format(*ends)


def as_markdown(lines: Mapping[str, Mapping[str, Any]], *, pictures: bool = False) -> str:
    """Lay lines out as a Markdown table.

    Args:
        lines: What `standings` gave.
        pictures: The columns that tell how good and how varied pictures are, in the place of the main ones. (What
            shows the concept without an attack is the same for all attacks, and has one column.)
    """
    found = columns_of(lines.values())
    if pictures:
        columns = [column for column in found if column.key in PICTURES]
    else:
        plain = [replace(column, heading="pre-ASR") for column in found if column.key.startswith(PRE_ASR)][:1]
        usual = [column for column in found if column.key in MAIN or column.key.startswith(ASR)]
        accuracies = [column for column in usual if column.key in ACCURACIES]
        columns = [*accuracies, *plain, *(column for column in usual if column not in accuracies)]
    table = [["", *(column.heading for column in columns)], ["---"] * (len(columns) + 1)]
    table += [[name, *(worded(line, column) for column in columns)] for name, line in lines.items()]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in table
    )


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """List the cells as CSV, a line each, and the original as each concept and seed sees it.

    Of a measure there is the value, the interval and, of a share, its counts.
    """
    once = {(row["concept"], row["seed"]): row for row in rows if row["evaluation"] is not None or row["attacks"]}
    before = [{**row, "method": "original", "folder": "", "failed": {}, "costs": {}} for row in once.values()]
    flat = []
    for row in [*rows, *before]:
        line = {name: row[name] for name in ("method", "concept", "kind", "seed", "folder")}
        line["failed"] = "; ".join(f"{stage}: {said}" for stage, said in row["failed"].items())
        line |= {name: row.get("costs", {}).get(name) for name in COSTS}
        for name, value in measured(row, "original" if row["method"] == "original" else "result").items():
            for part, number in value.items():
                line[name if part == "value" else f"{name} {part}"] = number
        flat.append({key.replace(" ", "_").replace("-", "_").lower(): value for key, value in line.items()})
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(key for line in flat for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return stream.getvalue()
