"""The leaderboard of a benchmark: one self-contained HTML page, and the strip of pictures by every method."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from sfumato import storage
from sfumato.evaluation.cells import EXAMPLES_FILE
from sfumato.evaluation.plots import INK, LINE_COLOURS, inline_svg
from sfumato.evaluation.report import label_rows, picture_grid
from sfumato.evaluation.standings import columns_of, robustness, utility, worded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["methods_strip", "pareto_front", "render_leaderboard"]

DOMAINS = {"object": "Objects", "style": "Styles", "attribute": "Attributes", "global": "Several at once"}
MARKERS = "osD^vP"
Point = tuple[Mapping[str, float], Mapping[str, float]]


def render_leaderboard(found: Mapping[str, Any], folder: Path) -> str:
    """Render a benchmark as one HTML page that needs no other file and no network.

    Args:
        found: What ``leaderboard.json`` holds.
        folder: The benchmark's folder, which the cells' pictures are in.

    Returns:
        The page, all texts in it escaped. The same benchmark gives the same page.

    Raises:
        ImportError: If jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError("The leaderboard needs jinja2: run pip install 'sfumato[eval]'.") from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    source = resources.files("sfumato.evaluation").joinpath("templates", "leaderboard.html.j2").read_text("utf-8")
    failures = [
        {**row, "stage": stage, "said": said} for row in found["cells"] for stage, said in row["failed"].items()
    ]
    return environment.from_string(source).render(
        found=found, failures=failures, overall=_table(found["methods"]),
        plots=[(caption, Markup(svg)) for caption, svg in _plots(found["methods"])],  # matplotlib escapes its text
        domains=[(DOMAINS.get(name, name), _table(lines)) for name, lines in found["domains"].items()],
        concepts=[
            {
                "name": name, "table": _table(lines, neighbours=True),
                "grid": _grid([row for row in found["cells"] if row["concept"] == name], folder),
            }
            for name, lines in found["concepts"].items()
        ],
    )  # fmt: skip


def methods_strip(rows: Sequence[Mapping[str, Any]], folder: Path) -> bytes | None:
    """Show the first concept across all methods: a row each, the same prompts and seeds; its own, then others.

    Args:
        rows: The benchmark's cells.
        folder: Its folder.

    Returns:
        A PNG; None if no cell has pictures.
    """
    shown = [row for row in rows if "examples" in row]
    shown = [row for row in shown if (row["concept"], row["seed"]) == (shown[0]["concept"], shown[0]["seed"])]
    if not shown:
        return None
    pictures, _ = _pictures(shown, folder)
    sheet = picture_grid(torch.stack(list(pictures.values())), scale=2 if shown and _side(pictures) <= 64 else 1)
    stream = io.BytesIO()
    label_rows(sheet, list(pictures)).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Name the points that no other is at least as good as in both and better in one, from the left.

    Args:
        points: Name to two figures of which more is better.
    """

    def beaten(point: tuple[float, float]) -> bool:
        return any(
            other[0] >= point[0] and other[1] >= point[1] and other != point for other in points.values()
        )  # fmt: skip

    return sorted((name for name, point in points.items() if not beaten(point)), key=lambda name: points[name])


def _table(lines: Mapping[str, Mapping[str, Any]], *, neighbours: bool = False) -> dict[str, Any]:
    """Headings and worded cells, each with the number that it is sorted by."""
    columns = columns_of(lines.values(), neighbours=neighbours)
    body = []
    for name, line in lines.items():
        cells = []
        for column in columns:
            value = line["measures"].get(column.key, line["costs"].get(column.key))
            number = value["value"] if isinstance(value, Mapping) else value
            text, _, interval = worded(line, column).partition(" ")
            cells.append({"text": text, "interval": interval, "number": "" if number is None else f"{number:.9g}"})
        body.append({"name": name, "cells": cells, "failed": line["failed"], "count": line["cells"]})
    return {"columns": columns, "rows": body}


def _plots(lines: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The Pareto plots, each with its caption."""
    forgets: dict[str, Point] = {}
    resists: dict[str, Point] = {}
    for name, line in lines.items():
        gone, kept, hard = line["measures"].get("ua"), utility(line), robustness(line)
        if kept is not None and gone is not None:
            forgets[name] = (kept, gone)
        if kept is not None and hard is not None:
            resists[name] = (kept, hard)
    order, useful = list(lines), "IRA" if any("ira" in line["measures"] for line in lines.values()) else "neighbours"
    strongest = "1 - ASR under the attack that is strongest on each"
    chosen = [
        (f"Robustness ({strongest}) against utility ({useful})", "1 - ASR", resists),
        (f"Unlearning accuracy (UA) against utility ({useful})", "UA", forgets),
    ]
    return [
        (
            caption,
            inline_svg(
                partial(_scatter, points=points, order=order, labels=(useful, label)), (5.6, 3.4), needed_by="A plot"
            ),
        )
        for caption, label, points in chosen
        if points
    ]


def _scatter(figure: Figure, *, points: Mapping[str, Point], order: Sequence[str], labels: tuple[str, str]) -> None:
    axes = figure.add_subplot()
    for name, (x, y) in points.items():
        at = order.index(name)
        colour = LINE_COLOURS[at % len(LINE_COLOURS)]
        wide, high = (
            [[100 * (of["value"] - of["low"])], [100 * (of["high"] - of["value"])]] for of in (x, y)
        )  # fmt: skip
        axes.errorbar(
            100 * x["value"], 100 * y["value"], xerr=wide, yerr=high, color=colour,
            ecolor=(*_rgb(colour), 0.35), elinewidth=1, marker=MARKERS[at // len(LINE_COLOURS) % len(MARKERS)],
            markersize=6, linestyle="none", label=name,
        )  # fmt: skip
    front = pareto_front({name: (x["value"], y["value"]) for name, (x, y) in points.items()})
    ends = [(100 * points[name][0]["value"], 100 * points[name][1]["value"]) for name in front]
    axes.plot(*zip(*ends, strict=True), color=INK, alpha=0.35, linewidth=0.9, linestyle="--", zorder=0)
    axes.set_xlabel(f"{labels[0]}, %")
    axes.set_ylabel(f"{labels[1]}, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=INK, alpha=0.1, linewidth=0.6)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))


def _pictures(rows: Sequence[Mapping[str, Any]], folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Model to pictures (N, 3, H, W) in [0, 1] of the same prompts and seeds, the original first; and the prompts."""
    pictures: dict[str, torch.Tensor] = {}
    prompts: list[str] = []
    for row in rows:
        file = folder / row["examples"] / EXAMPLES_FILE
        stored = storage.load_tensors(file)
        pictures.setdefault("original", stored["original"].float() / 255)
        pictures[row["method"]] = stored["result"].float() / 255
        prompts = list(storage.read_metadata(file)["prompts"])
    return pictures, prompts


def _side(pictures: Mapping[str, torch.Tensor]) -> int:
    return next(iter(pictures.values())).shape[-1]


def _grid(rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """The pictures of one concept, by its first seed that has some."""
    shown = [row for row in rows if "examples" in row]
    if not shown:
        return {"prompts": [], "strips": [], "seed": None}
    pictures, prompts = _pictures([row for row in shown if row["seed"] == shown[0]["seed"]], folder)
    strips = [{"name": name, **_embedded(picture_grid(some[None], 64 // _side(pictures) or 1, 4))} for name, some in
              pictures.items()]  # fmt: skip
    return {"prompts": prompts, "strips": strips, "seed": shown[0]["seed"]}


def _embedded(image: Image.Image) -> dict[str, Any]:
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return {"data": base64.b64encode(stream.getvalue()).decode("ascii"), "width": image.width, "height": image.height}
