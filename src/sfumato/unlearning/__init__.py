"""Concept unlearning: one file a method, and what they share."""

from sfumato.unlearning.core import METHODS, ExampleConfig, unlearn

__all__ = ["METHODS", "ExampleConfig", "unlearn"]
