"""How the documentation is built: `make docs`, where a warning is an error."""

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

import sfumato

sys.path.insert(0, str(Path(__file__).parent))  # mathml.py

project = "sfumato"
author = "the sfumato authors"
copyright = "the sfumato authors, Apache-2.0"
version = release = sfumato.__version__

extensions = [
    "mathml",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["images/**", "pictures/**"]
default_role = "code"  # docstrings put names in single backticks

myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Docstrings are Google's, types are the signatures'. There is no intersphinx: the build needs no network.
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_ivar = True
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 100
nitpicky = True  # a role that leads nowhere is an error; what a signature names need not be on a page

html_title = f"sfumato {version}"
html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
highlight_language = "none"  # of what is indented in docstrings: equations and commands too
pygments_style = "friendly"
copybutton_exclude = ".linenos, .gp, .go"


def mend_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """What is indented below a colon is shown as it is written; links of diffusers' doc-builder are names in code."""
    for k, line in enumerate(lines):
        below = next((further for further in lines[k + 1 :] if further.strip()), "")
        indent = len(line) - len(line.lstrip())
        opens = line.endswith(":") and not line.endswith("::") and not any(lines[k + 1 : k + 2])
        if opens and below.startswith(" " * (indent + 4)):
            lines[k] += ":"
        lines[k] = re.sub(r"\[`~?([\w.]+)`\]", r"``\1``", lines[k])


def skip_fields(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """A named tuple's fields are in its docstring."""
    return True if (getattr(obj, "__doc__", "") or "").startswith("Alias for field number") else None


def plain_name(app: Sphinx, env: Any, node: nodes.Element, contnode: nodes.Element) -> nodes.Element | None:
    """Types in signatures need not be on a page, and names of other libraries lead nowhere without a network."""
    if node.get("refdomain") == "py" and ("refwarn" not in node or not node["reftarget"].startswith("sfumato")):
        return contnode
    return None


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", mend_docstring, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("missing-reference", plain_name)
