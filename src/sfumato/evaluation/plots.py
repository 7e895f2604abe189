"""Drawings inside a page: matplotlib's SVG that takes the colour of the text around it, the same bytes each time."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["INK", "LINE_COLOURS", "inline_svg"]

LINE_COLOURS = ("#2f8f9d", "#d08342", "#8a6fc2", "#5d9a55", "#c25b78", "#8a8f98")  # legible on white and on black
INK = "#010203"  # stands for the text colour of the page while matplotlib draws


def inline_svg(draw: Callable[[Figure], None], size: tuple[float, float], *, needed_by: str) -> str:
    """Draw a figure as an element for an HTML page.

    Args:
        draw: Fills the figure; what is to have the page's text colour it draws in `INK`.
        size: Width and height, in inches.
        needed_by: Begins the sentence that says what needs matplotlib.

    Returns:
        An ``<svg>`` element, its texts escaped by matplotlib. The same drawing gives the same string.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{needed_by} needs matplotlib: run pip install 'sfumato[eval]'.") from error
    style = {
        "svg.hashsalt": "sfumato",  # else ids are random
        "svg.fonttype": "none",  # text stays text
        "font.family": ["sans-serif"],
        "font.size": 10.5,
        "text.parse_math": False,  # a name may hold a dollar
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        stream = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    svg = stream.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor").rstrip()  # no XML prologue inside HTML
