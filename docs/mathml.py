"""Equations as MathML, which browsers draw themselves: the pages need neither a script nor the network.

latex2mathml reads LaTeX; what it leaves unread becomes a warning, which fails the build.
"""

import re
import unicodedata
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

logger = logging.getLogger(__name__)

# Browsers dropped `mathvariant` in favour of Unicode's own bold letters.
STYLES = {"bold": "BOLD", "bold-italic": "BOLD ITALIC", "double-struck": "DOUBLE-STRUCK"}
STYLED = re.compile(r'<m([ion]) mathvariant="([a-z-]+)">(.|&#x[0-9A-F]+;)</m\1>')
# What latex2mathml reads otherwise than LaTeX does, in words that it knows.
READABLE = {
    r"(begin|end)\{(aligned|split|gathered|align)\}": r"\1{align*}",
    r"\\arg\s*\\(min|max)(?![a-z])": r"\\arg\1",
    r"\\operatorname\*?\{arg(?:\\,|\s)*(min|max)\}": r"\\arg\1",
    r"\\operatorname\*": r"\\operatorname",
}
TILDE, SIMILAR = "<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>"  # its "\\sim" is a tilde
UNREAD = re.compile(r"<m[iot][a-z]*>(\\[^<]*|&amp;|&)<|linebreak=")


def styled(match: re.Match) -> str:
    """One letter in a style, as that letter of Unicode's."""
    tag, style, letter = match.groups()
    if letter.startswith("&"):
        letter = chr(int(letter[3:-1], 16))
    if style == "normal" or style not in STYLES:
        return match.group()
    name = unicodedata.name(letter).replace("LATIN ", "").replace("GREEK ", "")
    name = name.replace("LETTER ", "").replace("LUNATE EPSILON SYMBOL", "EPSILON SYMBOL")
    style = "BOLD" if name.startswith("DIGIT") and style.startswith("bold") else STYLES[style]
    try:
        return f"<m{tag}>{unicodedata.lookup(f'MATHEMATICAL {style} {name}')}</m{tag}>"
    except KeyError:
        return match.group()


def mathml(latex: str, display: str, node: nodes.Node) -> str:
    """LaTeX as MathML; what could not be read is reported with its place."""
    parts = [part.strip() for part in latex.split("\n\n") if part.strip()]
    latex = r" \\ ".join(parts)
    for pattern, replacement in READABLE.items():
        latex = re.sub(pattern, replacement, latex)
    if r"\\" in latex and r"\begin" not in latex:
        latex = rf"\begin{{align*}}{latex}\end{{align*}}"
    try:
        drawn = STYLED.sub(styled, convert(latex, display=display)).replace(TILDE, SIMILAR)
    except Exception as error:  # whatever its parser raises is the equation's fault
        logger.warning("latex2mathml cannot read %r: %r", latex, error, location=node)
        return ""
    if unread := UNREAD.search(drawn):
        logger.warning("latex2mathml leaves %r of %r unread", unread.group(), latex, location=node)
    return drawn


def visit_math(self: Any, node: nodes.math) -> None:
    """Write an equation within a line."""
    self.body.append(mathml(node.astext(), "inline", node))
    raise nodes.SkipNode


def visit_math_block(self: Any, node: nodes.math_block) -> None:
    """Write an equation of its own lines."""
    self.body.append(self.starttag(node, "div", CLASS="math"))
    if node.get("number"):
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})</span>')
    self.body.append(mathml(node.astext(), "block", node) + "</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx calls this."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
