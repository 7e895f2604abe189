"""Concept unlearning: one file a method, and what they share."""

from sfumato.unlearning.core import rehearse, unlearn
from sfumato.unlearning.methods import METHODS
from sfumato.unlearning.task import ExampleConfig

__all__ = ["METHODS", "ExampleConfig", "rehearse", "unlearn"]
