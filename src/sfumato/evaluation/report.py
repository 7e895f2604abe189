"""The report: one self-contained HTML page, and the same numbers as a table for the terminal.

A `Report` holds what a run found: a verdict, measures with intervals before and after (`MetricRow`), pictures side by
side (`GridSection`), the loss history and facts about the run. Nothing in it knows which method, concept or sampler it
is about. `write_report` renders it with ``templates/report.html.j2``; the page loads nothing from anywhere, and equal
reports give equal bytes.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from sfumato import storage
from sfumato.evaluation.metrics import Proportion
from sfumato.evaluation.plots import INK, LINE_COLOURS, inline_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "GridSection",
    "MetricRow",
    "Report",
    "Table",
    "label_rows",
    "loss_curve_svg",
    "picture_grid",
    "plain_table",
    "render_report",
    "write_report",
]

_NOT_A_TERM = ("step", "learning_rate", "seconds")


@dataclass(frozen=True)
class MetricRow:
    """One measure, before and after.

    Attributes:
        name: Short name, for instance ``"UA"``.
        explanation: One sentence: what it counts, and which way is better.
        before: The original model's proportion, with a 95 % interval.
        after: The changed model's proportion, with a 95 % interval.
        target: What was aimed at, for instance ``"at least 95 %"``; None if nothing was.
        reached: Whether the target was reached; None if there is no saying.
    """

    name: str
    explanation: str
    before: Proportion
    after: Proportion
    target: str | None = None
    reached: bool | None = None


@dataclass(frozen=True)
class Table:
    """A plain table; the first cell of each row names the row.

    Attributes:
        columns: Headings, one for each cell of a row.
        rows: Cells, already worded.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        """Check that rows and headings fit."""
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"A table with {len(self.columns)} columns can't hold a row of {len(row)} cells: {row}."
                )


@dataclass
class GridSection:
    """Pictures to compare: the same rows and columns in each grid, side by side.

    Attributes:
        title: Heading.
        text: What to look for.
        row_labels: One for each row, usually the prompts.
        column_labels: One for each column, for instance the seeds; may be empty.
        grids: Pairs ``(caption, pictures)``; pictures are ``(rows, columns, 3, H, W)`` in [0, 1].
        table: Numbers that belong to the pictures.
    """

    title: str
    text: str
    row_labels: list[str]
    column_labels: list[str]
    grids: list[tuple[str, torch.Tensor]]
    table: Table | None = None

    def __post_init__(self) -> None:
        """Check that pictures and labels fit."""
        if not self.grids:
            raise ValueError(f"Section {self.title!r} has no grids; give at least one (caption, pictures).")
        columns = self.grids[0][1].shape[1:2]
        for caption, pictures in self.grids:
            _check_pictures(pictures, f"grid {caption!r} of section {self.title!r}")
            if len(pictures) != len(self.row_labels):
                raise ValueError(
                    f"Grid {caption!r} has {len(pictures)} rows, but there are {len(self.row_labels)} labels."
                )
            if pictures.shape[1:2] != columns or (self.column_labels and pictures.shape[1] != len(self.column_labels)):
                raise ValueError(
                    f"Grid {caption!r} has {pictures.shape[1]} columns; the grids of a section and its "
                    f"{len(self.column_labels)} column labels must agree."
                )


@dataclass
class Report:
    """All that one run found.

    Attributes:
        title: What was done, for instance ``"Erasing “sneaker” from atelier"``.
        summary: The verdict, in one sentence; it heads the page.
        metrics: The measures.
        sections: The pictures.
        history: Rows that `sfumato.trainer.train` returned.
        facts: Name to worded value: times, memory, sizes, seeds, versions.
        command: What to type to get this report again.
        reproduce: How far a second run will agree with this one.
    """

    title: str
    summary: str
    metrics: Sequence[MetricRow] = ()
    sections: Sequence[GridSection] = ()
    history: Sequence[Mapping[str, float]] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    reproduce: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Give all but pictures and history as JSON can hold it, for leaderboards and model cards."""
        return {
            "title": self.title,
            "summary": self.summary,
            "metrics": [asdict(row) for row in self.metrics],
            "facts": dict(self.facts),
            "command": self.command,
            "reproduce": self.reproduce,
        }


def plain_table(rows: Sequence[MetricRow]) -> str:
    """Lay out measures for the terminal.

    Args:
        rows: The measures.

    Returns:
        A line for each, such as ``UA   4.0 % [2.1, 7.5]  ->  98.5 % [95.7, 99.5]``, without a final newline.
    """
    cells = [
        (
            row.name,
            _percent(row.before),
            _interval(row.before),
            _percent(row.after),
            _interval(row.after),
            _target(row),
        )
        for row in rows
    ]
    name, before, between, after, spread = (max((len(c[i]) for c in cells), default=0) for i in range(5))
    lines = (
        f"{c[0]:<{name}}  {c[1]:>{before}} {c[2]:<{between}}  ->  {c[3]:>{after}} {c[4]:<{spread}}  {c[5]}"
        for c in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def _percent(proportion: Proportion) -> str:
    return f"{100 * proportion.value:.1f} %"


def _interval(proportion: Proportion) -> str:
    return f"[{100 * proportion.low:.1f}, {100 * proportion.high:.1f}]"


def _target(row: MetricRow) -> str:
    if row.target is None:
        return ""
    return f"target {row.target}" + {True: ": reached", False: ": missed", None: ""}[row.reached]


def picture_grid(pictures: torch.Tensor, scale: int = 3, gap: int = 2) -> Image.Image:
    """Lay pictures out in rows and columns, each pixel a square, on white.

    Args:
        pictures: RGB ``(rows, columns, 3, H, W)`` in [0, 1].
        scale: Side of a pixel in the result.
        gap: White pixels of the result between pictures; there is no border.

    Returns:
        An RGB picture, ``columns * (scale * W + gap) - gap`` wide and ``rows * (scale * H + gap) - gap`` high.

    Raises:
        ValueError: If the shape or the range is another, or `scale` or `gap` is not sensible.
    """
    _check_pictures(pictures, "`pictures`")
    if scale < 1 or gap < 0:
        raise ValueError(f"`scale` must be at least 1 and `gap` at least 0, got {scale} and {gap}.")
    rows, columns = pictures.shape[:2]
    flat = pictures.detach().cpu().float().clamp(0, 1).flatten(0, 1)  # (rows * columns, 3, H, W)
    large = flat.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    padded = F.pad(large, (0, gap, 0, gap), value=1.0).unflatten(0, (rows, columns))
    sheet = padded.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (rows * h, columns * w, 3)
    sheet = sheet[: sheet.shape[0] - gap, : sheet.shape[1] - gap]
    return Image.fromarray((sheet * 255).round().to(torch.uint8).contiguous().numpy())


def label_rows(image: Image.Image, labels: Sequence[str], size: int = 13) -> Image.Image:
    """Write a label to the left of each row of a picture grid.

    Args:
        image: What `picture_grid` gave.
        labels: One for each row, from the top.
        size: Height of the letters, in pixels.

    Returns:
        An RGB picture of the same height.
    """
    font = ImageFont.load_default(size)
    width = max(math.ceil(font.getlength(label)) for label in labels) + size
    sheet = Image.new("RGB", (width + image.width, image.height), "white")
    sheet.paste(image, (width, 0))
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(labels):
        middle = (row + 0.5) * image.height / len(labels)
        draw.text((width - size / 2, middle), label, "black", font, anchor="rm")
    return sheet


def _check_pictures(pictures: torch.Tensor, name: str) -> None:
    if pictures.ndim != 5 or pictures.shape[2] != 3 or not pictures.numel():
        raise ValueError(f"{name} must be (rows, columns, 3, H, W) and not empty, got shape {tuple(pictures.shape)}.")
    if not pictures.is_floating_point():
        raise ValueError(f"{name} must be floating-point in [0, 1], got {pictures.dtype}; divide bytes by 255.")
    low, high = (float(end) for end in pictures.aminmax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also refuses NaN
        raise ValueError(f"{name} must be in [0, 1], got values from {low:.3g} to {high:.3g}.")


def loss_curve_svg(history: Sequence[Mapping[str, float]]) -> str:
    """Draw the terms of a loss over the steps: faint as they were, bold as a moving average.

    Text and axes take the colour of the text around them, so one drawing serves light and dark pages.

    Args:
        history: Rows that `sfumato.trainer.train` returned: ``step``, and a value for each term. ``learning_rate`` and
            ``seconds`` are not drawn; a row may lack a term.

    Returns:
        An ``<svg>`` element. The same history gives the same string.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is nothing to draw.
    """
    terms = list(dict.fromkeys(name for row in history for name in row if name not in _NOT_A_TERM))
    if not terms:
        raise ValueError("`history` holds no loss to draw; leave it empty in the report if there was no training.")
    return inline_svg(
        lambda figure: _draw_terms(figure.add_subplot(), history, terms), (5.8, 3.1), needed_by="The loss curve"
    )


def _draw_terms(axes: Axes, history: Sequence[Mapping[str, float]], terms: Sequence[str]) -> None:
    steps = [row.get("step", index) for index, row in enumerate(history)]
    smooth = []
    for index, term in enumerate(terms):
        values = [float(row.get(term, math.nan)) for row in history]
        smooth.append(_moving_average(values, len(values) // 20))
        colour = LINE_COLOURS[index % len(LINE_COLOURS)]
        axes.plot(steps, values, color=colour, alpha=0.28, linewidth=0.8)
        axes.plot(steps, smooth[-1], color=colour, linewidth=1.8, label=term, marker="o" if len(steps) == 1 else None)
    finite = [value for line in smooth for value in line if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) > 20 * min(finite):
        axes.set_yscale("log")  # else the smaller terms lie flat on the axis
        axes.yaxis.set_major_formatter("{x:g}")  # the default's powers are mathtext, which is off
        axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    axes.figure.legend(loc="outside upper left", ncols=4, frameon=False, handlelength=1.4)


def _moving_average(values: Sequence[float], reach: int) -> list[float]:
    """Mean of the finite values at most `reach` places away; NaN where there are none."""
    raw = np.asarray(values)
    finite = np.isfinite(raw)
    window = np.ones(2 * reach + 1)
    count = np.convolve(finite, window, "same")
    total = np.convolve(np.where(finite, raw, 0.0), window, "same")
    return np.where(count > 0, total / np.maximum(count, 1), math.nan).tolist()


def render_report(report: Report) -> str:
    """Render a report as one HTML page that needs no other file and no network.

    Args:
        report: What to show. All texts in it are escaped.

    Returns:
        The page. Equal reports give equal pages.

    Raises:
        ImportError: If jinja2 is not installed, or matplotlib if there is a history.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError("The report page needs jinja2: run pip install 'sfumato[eval]'.") from error
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(percent=_percent, interval=_interval)
    source = resources.files("sfumato.evaluation").joinpath("templates", "report.html.j2").read_text("utf-8")
    curve = Markup(loss_curve_svg(report.history)) if report.history else ""  # matplotlib escapes its text
    judged = [row.reached for row in report.metrics if row.reached is not None]
    return environment.from_string(source).render(
        report=report, curve=curve, reached=sum(judged), judged=len(judged), strips=_strips
    )


def write_report(report: Report, path: str | Path) -> Path:
    """Render a report and write it, atomically.

    Args:
        report: What to show.
        path: The HTML file; replaced if it exists.

    Returns:
        The path.

    Raises:
        ImportError: If jinja2 is not installed, or matplotlib if there is a history.
    """
    return storage.write_text(path, render_report(report))


def _strips(section: GridSection, row: int) -> list[dict[str, Any]]:
    """One row of each grid of a section as a picture to embed: so labels stay beside their pictures on any screen."""
    columns = f", {', '.join(section.column_labels)}" if section.column_labels else ""
    return [
        {
            "caption": caption,
            "alt": f"{caption}: {section.row_labels[row]}{columns}",
            **_embedded(pictures[row : row + 1]),
        }
        for caption, pictures in section.grids
    ]


def _embedded(pictures: torch.Tensor) -> dict[str, Any]:
    """A row of pictures (1, columns, 3, H, W) as a base64 PNG with its size, the largest it is shown at."""
    width = pictures.shape[-1]
    if width > 256:  # enough to compare by; a page of full-size pictures would be too large to open
        size = (max(1, round(pictures.shape[-2] * 256 / width)), 256)
        pictures = F.interpolate(pictures[0].float(), size=size, mode="area").unsqueeze(0)
    scale = max(1, 128 // width)
    image = picture_grid(pictures, scale=scale, gap=4)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return {"data": data, "width": image.width, "height": image.height}
