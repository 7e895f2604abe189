"""Functions of the user's own, by the name that a command line gives them."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

__all__ = ["function_named"]


def function_named(name: str, role: str) -> Any:
    """Import a function; of the installed packages, else of a file in the folder that the command is run in.

    Args:
        name: ``MODULE:FUNCTION``.
        role: What it is for, as the error says it.

    Returns:
        The function.

    Raises:
        ImportError: If there is no such module, or no such function in it.
    """
    module, _, function = name.partition(":")
    if not {"", os.getcwd()} & set(sys.path):  # an installed command, unlike python -m, leaves it out
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a module of the user's raises as it is run
        raise ImportError(f"The {role} {name} can't be imported: {type(error).__name__}: {error}.") from error
