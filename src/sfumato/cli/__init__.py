"""The ``sfumato`` command. What is heavy is imported by the command that needs it, so that ``--help`` is instant."""

from sfumato.cli.commands import main

__all__ = ["main"]
