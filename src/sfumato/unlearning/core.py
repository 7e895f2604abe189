"""Unlearning as one call: a pipeline, a concept and a method in, an unlearned pipeline out.

``unlearn`` does what every method needs around its objective: it resolves the concept, checks everything that can be
checked before the long work, provides the examples, copies the denoiser, runs the method, and writes a result that
stock diffusers loads, with a manifest beside it.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from sfumato import concepts, recipes, storage
from sfumato.families import Family, StableDiffusion, TextFamily, family_of
from sfumato.trainer import TrainingConfig, make_accelerator, preflight
from sfumato.unlearning.costs import Costs
from sfumato.unlearning.result import OutputConfig, check_output, write_result
from sfumato.unlearning.saliency import mask_density
from sfumato.unlearning.task import ExampleConfig, Task
from sfumato.unlearning.verdict import pronounce, require_known
from sfumato.unlearning.working_copy import working_copy

__all__ = ["METHODS", "ExampleConfig", "Method", "configure", "method_named", "unlearn"]


logger = logging.getLogger(__name__)


class Method(NamedTuple):
    """Where a method is.

    Attributes:
        module: A module as `sfumato.unlearning.task` describes it.
        config: The name of its config there.
        trains: Whether it trains, rather than solves an equation.
        examples: Whether it sees pictures.
        anchors: Whether it is told what to show instead.
        retains: Whether it is told what to keep.
        family: The families that it is defined for.
        wants: What it needs of a model that others lack.
    """

    module: str
    config: str
    trains: bool = True
    examples: bool = True
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
    "concept_ablation": Method("sfumato.unlearning.concept_ablation", "ConceptAblationConfig"),
    "doco": Method("sfumato.unlearning.doco", "DoCoConfig"),
    "gradient_ascent": Method("sfumato.unlearning.gradient_ascent", "GradientAscentConfig", anchors=False),
    "proximal": Method("sfumato.unlearning.proximal", "ProximalConfig"),
}


def unlearn(
    pipe: DiffusionPipeline,
    forget: str | Sequence[str],
    method: str = "salun",
    *,
    anchor: str | None = None,
    retain: Sequence[str] | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    recipe: str | Path | None = None,
    verify: bool = True,
    **settings: Any,
) -> DiffusionPipeline:
    """Make a pipeline forget a concept.

    Args:
        pipe: The model. Its weights are not changed; it is moved to the training device.
        forget: What to forget, a phrase or several.
        method: One of `METHODS`.
        anchor: What to show instead; see `sfumato.concepts.resolve` for the default.
        retain: Prompts that must keep their meaning; likewise.
        output_dir: Where to write the result, as `OutputConfig` says, mask, manifest and logs; None keeps it all in
            memory.
        resume: Continue a run in `output_dir` that was cut short.
        recipe: A YAML file of settings; default is the model's own recipe, if it has one.
        verify: Check at the end whether the concept is gone and what happened to its neighbours, and say so.
        **settings: Any field of the method's config, `ExampleConfig`, `TrainingConfig` or `OutputConfig`; they
            override the recipe.

    Returns:
        A new pipeline of the same kind, which shares every component with `pipe` but the one that the method changes:
        the denoiser, or the text encoder.

    Raises:
        ValueError: If the family, method, concept or a setting is unknown, the sets contradict each other, or the
            text encoder and the denoiser have different dtypes.
        FileExistsError: If `output_dir` already holds a result, or other files.
        OSError: If `output_dir` can't be written or its disk is full, or a picture, mask or recipe is not there.
        ImportError: If an optional package that a setting asks for is missing.
        NonFiniteLossError: If the loss or a weight becomes NaN or infinite.
    """
    began = time.perf_counter()
    family = family_of(pipe)
    family.check_dtypes()
    chosen_method = method_named(method)
    if not isinstance(family, chosen_method.family):
        raise ValueError(f"{method} is not defined for {family.label}: {chosen_method.wants}. Choose another method.")
    concept = concepts.resolve(pipe, forget, anchor=anchor, retain=retain)
    for name, given, used in (("anchor", anchor, chosen_method.anchors), ("retain", retain, chosen_method.retains)):
        if given is not None and not used:
            logger.warning(
                f"{method} has no use for `{name}`: it only tells the check at the end what to compare with."
            )
    found = recipes.find_recipe(method, pipe, forget, recipe)
    chosen = {**found.settings, **settings}
    configs = {type(config): config for config in configure(chosen_method.configs, chosen)}
    config = configs[chosen_method.config_class]
    sources, training = configs.get(ExampleConfig, ExampleConfig()), configs.get(TrainingConfig, TrainingConfig())
    output = configs[OutputConfig]
    check_output(pipe, family.parts[config.part], output)
    names = family.trainable_parameters(config.parameters, config.part)
    folder = storage.check_output_dir(output_dir, resume=resume) if output_dir is not None else None
    if folder is not None:
        storage.check_disk_space(folder, 2 * _size_of(pipe))
    identity = {
        "method": method, "forget": concept.name, "concept": asdict(concept), "settings": asdict(config),
        "base": storage.fingerprint(family.parts[config.part].named_parameters()), "examples": asdict(sources),
    }  # fmt: skip
    accelerator = make_accelerator(training, folder)
    costs = Costs(accelerator, folder, resume=resume, began=began)
    implementation: Any = importlib.import_module(chosen_method.module)
    changes = {name: getattr(config, name) for name in ("adapter_rank", "prune_ratio") if chosen_method.trains}
    with working_copy(family.parts[config.part], names, seed=training.seed, **changes) as (model, kept):
        task = Task(
            family, concept, model, sources, training, identity, accelerator, folder, resume, kept=kept, costs=costs
        )
        if hasattr(implementation, "check"):
            implementation.check(task, config)
        if chosen_method.trains:
            preflight(
                model, config.batch_size, training, accelerator=accelerator, output_dir=folder, identity=identity,
                resume=resume,
            )  # fmt: skip
        pipe.to(accelerator.device)
        model.to(accelerator.device)
        require_known(family, concept)
        task.read_folders()
        with _counting(costs.counted, family.denoiser, model if config.part == "denoiser" else None):
            history, facts = implementation.run(task, config)
    _cast(model.requires_grad_(False), next(family.parts[config.part].parameters()).dtype)
    result = family.with_parts({config.part: model})
    if verify and accelerator.is_main_process:
        facts = {**facts, "expected": dict(found.expected)}
        try:
            verdict = pronounce(pipe, result, concept, training.seed)
        except Exception as error:  # whatever stops the check, the work that is done is kept
            said = f"The result could not be checked ({type(error).__name__}: {error}); it is kept as it is."
        else:
            facts["verdict"] = verdict.as_dict()
            said = verdict.sentence(concept.name, found.expected.get("ua"))
        tqdm.write(said, file=sys.stderr)
    facts = {**facts, **costs.so_far()}
    if folder is not None and accelerator.is_main_process:
        settings_used = {name: value for part in configs.values() for name, value in asdict(part).items()}
        manifest = _manifest(task, method, settings_used, facts)
        write_result(pipe, result, folder, output, history, manifest)
    accelerator.wait_for_everyone()
    return result


def method_named(method: str) -> Method:
    """Find a method; ValueError, naming those there are, if it is unknown."""
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}; choose from {', '.join(METHODS)}.")
    return METHODS[method]


def configure(classes: Sequence[Any], settings: Mapping[str, Any]) -> list[Any]:
    """Share settings out among config classes by field name; ValueError if one is unknown or wrong."""
    known = {field.name for cls in classes for field in fields(cls)}
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(f"Unknown setting {name!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
    return [cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings}) for cls in classes]


@contextmanager
def _counting(count: torch.Tensor, *denoisers: torch.nn.Module | None) -> Iterator[None]:
    """Add the samples that pass through denoisers to `count`; a guided prediction is two."""

    def see(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        count.add_(len(args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))))

    hooks = [denoiser.register_forward_pre_hook(see, with_kwargs=True) for denoiser in denoisers if denoiser]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give the model the dtype that the pipeline came in, unless a weight would become infinite in it."""
    limit = torch.finfo(dtype).max
    for name, parameter in model.named_parameters():
        if parameter.abs().max() > limit:
            raise ValueError(
                f"{name} has a weight of {parameter.abs().max():.3g}, beyond what {dtype} can hold: load the pipeline"
                " in float32 or bfloat16, or use a smaller learning rate."
            )
    if any(parameter.dtype != dtype for parameter in model.parameters()):
        model.to(dtype)


def _size_of(pipe: DiffusionPipeline) -> int:
    modules = (part for part in pipe.components.values() if isinstance(part, torch.nn.Module))
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def _manifest(task: Task, method: str, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    packages = ("sfumato", "torch", "diffusers", "transformers", "accelerate", "safetensors")
    concept, device = task.concept, task.accelerator.device
    pruned = {"pruned_share": 1 - mask_density(task.kept)} if task.kept else {}
    return {
        "method": method,
        "forget": concept.name,
        "anchors": sorted(set(concept.anchors)),
        "retain_prompts": len(concept.retain),
        "concept": asdict(concept),
        "model": task.family.origin,
        "settings": dict(settings),
        **pruned,
        **facts,
        "base_fingerprint": task.identity["base"],
        "result_fingerprint": storage.fingerprint(task.model.named_parameters()),
        "processes": task.accelerator.num_processes,
        "device": str(device),
        "peak_memory_mb": round(peak_memory_mb(device), 1),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def peak_memory_mb(device: torch.device) -> float:
    """Give the peak memory of this process so far, in megabytes: the accelerator's if there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    scale = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
