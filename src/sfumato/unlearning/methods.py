"""Every unlearning method by its name: where it is, what it needs, and its settings."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from sfumato.families import Family, StableDiffusion, TextFamily
from sfumato.settings import nearest
from sfumato.trainer import TrainingConfig
from sfumato.unlearning.result import OutputConfig
from sfumato.unlearning.task import ExampleConfig

__all__ = ["METHODS", "Method", "configure", "method_named"]


class Method(NamedTuple):
    """Where a method is.

    Attributes:
        module: A module as `sfumato.unlearning.task` describes it.
        config: The name of its config there.
        trains: Whether it trains, rather than solves an equation.
        examples: Whether it sees pictures.
        forgets: Whether those of the concept are among them.
        anchors: Whether it is told what to show instead.
        retains: Whether it is told what to keep.
        family: The families that it is defined for.
        wants: What it needs of a model that others lack.
    """

    module: str
    config: str
    trains: bool = True
    examples: bool = True
    forgets: bool = True
    anchors: bool = True
    retains: bool = True
    family: Any = Family
    wants: str = ""

    @property
    def config_class(self) -> Any:
        """The dataclass of its settings."""
        return getattr(importlib.import_module(self.module), self.config)

    @property
    def configs(self) -> tuple[Any, ...]:
        """The dataclasses of all settings that it takes."""
        return (
            self.config_class,
            *((ExampleConfig,) if self.examples else ()),
            *((TrainingConfig,) if self.trains else ()),
            OutputConfig,
        )

    @property
    def summary(self) -> str:
        """The first line of its module."""
        return (importlib.import_module(self.module).__doc__ or "").strip().splitlines()[0]


CLIP = "it attacks and trains through CLIP's token embeddings, as Stable Diffusion 1, 2 and XL have them"
TEXT = "it edits the layers that read a text"
METHODS = {
    "salun": Method("sfumato.unlearning.salun", "SalUnConfig"),
    "esd": Method("sfumato.unlearning.esd", "ESDConfig", examples=False, anchors=False, retains=False),
    "advunlearn": Method(
        "sfumato.unlearning.advunlearn",
        "AdvUnlearnConfig",
        examples=False,
        anchors=False,
        family=StableDiffusion,
        wants=CLIP,
    ),
    "rece": Method("sfumato.unlearning.rece", "RECEConfig", False, False, family=TextFamily, wants=TEXT),
    "uce": Method("sfumato.unlearning.uce", "UCEConfig", False, False, family=TextFamily, wants=TEXT),
    "concept_ablation": Method("sfumato.unlearning.concept_ablation", "ConceptAblationConfig", forgets=False),
    "doco": Method("sfumato.unlearning.doco", "DoCoConfig", forgets=False),
    "gradient_ascent": Method("sfumato.unlearning.gradient_ascent", "GradientAscentConfig", anchors=False),
    "proximal": Method("sfumato.unlearning.proximal", "ProximalConfig"),
}


def method_named(method: str) -> Method:
    """Find a method; ValueError, naming those there are, if it is unknown."""
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}; choose from {', '.join(METHODS)}.{nearest(method, METHODS)}")
    return METHODS[method]


def configure(classes: Sequence[Any], settings: Mapping[str, Any]) -> list[Any]:
    """Share settings out among config classes by field name; ValueError if one is unknown or wrong."""
    known = {field.name for cls in classes for field in fields(cls)}
    for name in settings:
        if name not in known:
            raise ValueError(f"Unknown setting {name!r}.{nearest(str(name), known)}")
    return [cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings}) for cls in classes]
