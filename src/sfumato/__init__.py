"""sfumato: plug-in samplers, exact inversion and concept unlearning for Hugging Face diffusers.

The public names are imported when they are first used, so ``import sfumato`` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ClassConditionalPipeline": "sfumato.pipelines.pipeline_class_conditional",
    "Concept": "sfumato.concepts",
    "Judge": "sfumato.evaluation.judge",
    "TimeShiftScheduler": "sfumato.schedulers.scheduling_time_shift",
    "load": "sfumato.loading",
    "unlearn": "sfumato.unlearning.core",
}

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604

if TYPE_CHECKING:
    from sfumato.concepts import Concept as Concept
    from sfumato.evaluation.judge import Judge as Judge
    from sfumato.loading import load as load
    from sfumato.pipelines.pipeline_class_conditional import ClassConditionalPipeline as ClassConditionalPipeline
    from sfumato.schedulers.scheduling_time_shift import TimeShiftScheduler as TimeShiftScheduler
    from sfumato.unlearning.core import unlearn as unlearn
else:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'sfumato' has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
