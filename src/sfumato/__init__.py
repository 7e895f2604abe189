"""sfumato: plug-in samplers, exact inversion and concept unlearning for Hugging Face diffusers.

The public names are imported when they are first used, so ``import sfumato`` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOMES = {
    "BDIAScheduler": "sfumato.schedulers.scheduling_bdia",
    "BELMScheduler": "sfumato.schedulers.scheduling_belm",
    "ClassConditionalPipeline": "sfumato.pipelines.pipeline_class_conditional",
    "Concept": "sfumato.concepts",
    "DDCMScheduler": "sfumato.schedulers.scheduling_ddcm",
    "EDICTScheduler": "sfumato.schedulers.scheduling_edict",
    "EditFriendlyDDPMScheduler": "sfumato.schedulers.scheduling_edit_friendly_ddpm",
    "FixedPointScheduler": "sfumato.schedulers.scheduling_fixed_point",
    "InfEditPipeline": "sfumato.pipelines.pipeline_infedit",
    "Judge": "sfumato.evaluation.judge",
    "MinorityClassifier": "sfumato.pipelines.minority_classifier",
    "MinorityGuidancePipeline": "sfumato.pipelines.pipeline_minority_guidance",
    "MinorityGuidanceScheduler": "sfumato.schedulers.scheduling_minority_guidance",
    "OneMoreStepPipeline": "sfumato.pipelines.pipeline_one_more_step",
    "RDDMPipeline": "sfumato.pipelines.pipeline_rddm",
    "RDDMScheduler": "sfumato.schedulers.scheduling_rddm",
    "ResShiftPipeline": "sfumato.pipelines.pipeline_resshift",
    "ResShiftScheduler": "sfumato.schedulers.scheduling_resshift",
    "TimeShiftScheduler": "sfumato.schedulers.scheduling_time_shift",
    "draw_minority": "sfumato.minority_prompt",
    "edit": "sfumato.inversion",
    "TrajectoryVariance": "sfumato.trajectory_variance",
    "attack": "sfumato.attacks.audit",
    "evaluate": "sfumato.evaluation.evaluate",
    "find_boundary": "sfumato.boundary",
    "invert": "sfumato.inversion",
    "load": "sfumato.loading",
    "minority_scores": "sfumato.minority",
    "rehearse": "sfumato.unlearning.core",
    "release": "sfumato.releasing.core",
    "sample_with_gradients": "sfumato.gradients",
    "tune_time_shift": "sfumato.tuning",
    "unlearn": "sfumato.unlearning.core",
}

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604

if TYPE_CHECKING:
    from sfumato.attacks.audit import attack as attack
    from sfumato.boundary import find_boundary as find_boundary
    from sfumato.concepts import Concept as Concept
    from sfumato.evaluation.evaluate import evaluate as evaluate
    from sfumato.evaluation.judge import Judge as Judge
    from sfumato.gradients import sample_with_gradients as sample_with_gradients
    from sfumato.inversion import edit as edit
    from sfumato.inversion import invert as invert
    from sfumato.loading import load as load
    from sfumato.minority import minority_scores as minority_scores
    from sfumato.minority_prompt import draw_minority as draw_minority
    from sfumato.pipelines.minority_classifier import MinorityClassifier as MinorityClassifier
    from sfumato.pipelines.pipeline_class_conditional import ClassConditionalPipeline as ClassConditionalPipeline
    from sfumato.pipelines.pipeline_infedit import InfEditPipeline as InfEditPipeline
    from sfumato.pipelines.pipeline_minority_guidance import MinorityGuidancePipeline as MinorityGuidancePipeline
    from sfumato.pipelines.pipeline_one_more_step import OneMoreStepPipeline as OneMoreStepPipeline
    from sfumato.pipelines.pipeline_rddm import RDDMPipeline as RDDMPipeline
    from sfumato.pipelines.pipeline_resshift import ResShiftPipeline as ResShiftPipeline
    from sfumato.releasing.core import release as release
    from sfumato.schedulers.scheduling_bdia import BDIAScheduler as BDIAScheduler
    from sfumato.schedulers.scheduling_belm import BELMScheduler as BELMScheduler
    from sfumato.schedulers.scheduling_ddcm import DDCMScheduler as DDCMScheduler
    from sfumato.schedulers.scheduling_edict import EDICTScheduler as EDICTScheduler
    from sfumato.schedulers.scheduling_edit_friendly_ddpm import EditFriendlyDDPMScheduler as EditFriendlyDDPMScheduler
    from sfumato.schedulers.scheduling_fixed_point import FixedPointScheduler as FixedPointScheduler
    from sfumato.schedulers.scheduling_minority_guidance import MinorityGuidanceScheduler as MinorityGuidanceScheduler
    from sfumato.schedulers.scheduling_rddm import RDDMScheduler as RDDMScheduler
    from sfumato.schedulers.scheduling_resshift import ResShiftScheduler as ResShiftScheduler
    from sfumato.schedulers.scheduling_time_shift import TimeShiftScheduler as TimeShiftScheduler
    from sfumato.trajectory_variance import TrajectoryVariance as TrajectoryVariance
    from sfumato.tuning import tune_time_shift as tune_time_shift
    from sfumato.unlearning.core import rehearse as rehearse
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
