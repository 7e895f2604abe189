"""Releases: an unlearning result as a folder for the Hugging Face Hub, which loads without this package."""

from sfumato.releasing.core import release

__all__ = ["release"]
