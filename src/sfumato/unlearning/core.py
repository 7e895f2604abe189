"""Unlearning as one call: a pipeline, a concept and a method in, an unlearned pipeline out.

``unlearn`` does what every method needs around its objective: it resolves the concept, checks everything that can be
checked before the long work, provides the examples, copies the denoiser, runs the method, and writes a result that
stock diffusers loads, with a manifest beside it. ``rehearse`` does the same but for the long work, which it only
begins, and says what all of it would take.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from sfumato import storage
from sfumato.memory import peak_memory_mb, reset_peak_memory
from sfumato.progress import Phase, rehearsing
from sfumato.trainer import check_tracker, make_accelerator
from sfumato.unlearning.costs import Costs
from sfumato.unlearning.plan import Plan
from sfumato.unlearning.result import write_result
from sfumato.unlearning.run import Run
from sfumato.unlearning.saliency import mask_density
from sfumato.unlearning.task import Task
from sfumato.unlearning.verdict import can_judge

__all__ = ["rehearse", "unlearn"]


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
        MemoryError: If the memory does not suffice; the last checkpoint is kept.
    """
    began = time.perf_counter()
    run = Run.prepare(pipe, forget, method, anchor=anchor, retain=retain, recipe=recipe, settings=settings)
    folder = storage.check_output_dir(output_dir, resume=resume) if output_dir is not None else None
    if folder is not None:
        storage.check_disk_space(folder, run.disk_space())
    first = int(os.environ.get("RANK", 0)) == 0
    with storage.claimed(folder if first else None, resume=resume):
        accelerator = make_accelerator(run.training, folder)
        reset_peak_memory(accelerator.device)
        costs = Costs(accelerator, folder, resume=resume, began=began)
        task, history, facts = run.work(accelerator, folder, costs, resume=resume)
        result, lora = run.result(task)
        if verify and accelerator.is_main_process:
            facts = {**facts, **run.check(result)}
        facts = {**facts, **costs.so_far()}
        if folder is not None and accelerator.is_main_process:
            manifest = _manifest(task, method, run.settings(), {**facts, **run.origin()})
            write_result(pipe, result, folder, run.output, history, manifest, lora)
        accelerator.wait_for_everyone()
    return result


def rehearse(
    pipe: DiffusionPipeline,
    forget: str | Sequence[str],
    method: str = "salun",
    *,
    anchor: str | None = None,
    retain: Sequence[str] | None = None,
    output_dir: str | Path | None = None,
    recipe: str | Path | None = None,
    verify: bool = True,
    **settings: Any,
) -> Plan:
    """Say what a run would train, and the memory and time that it would take; nothing is written.

    All that `unlearn` checks before the long work is checked; then the loops of the long work, the drawing of
    pictures, walks, the mask and the training, are only begun: one batch of each, and two late steps, on the
    device that the run would have. The memory is what that took, the time what the loops would, from the last pass of
    each (AdvUnlearn's first steps, without an attack, are counted as if they had one).

    Args:
        pipe: As for `unlearn`, like the rest.
        forget: What to forget.
        method: One of `METHODS`.
        anchor: What to show instead.
        retain: Prompts that must keep their meaning.
        output_dir: Where the result would go: it must be writable, and have space for it and for checkpoints.
        recipe: A YAML file of settings.
        verify: Whether the run would check its result. On a model without a judge the check is left out here.
        **settings: Any setting.

    Returns:
        The plan; printed, it says all in a few lines.

    Raises:
        Exception: As `unlearn`.
    """
    run = Run.prepare(pipe, forget, method, anchor=anchor, retain=retain, recipe=recipe, settings=settings)
    folder = storage.check_output_dir(output_dir, resume=True) if output_dir is not None else None
    if folder is not None:
        storage.check_disk_space(folder, run.disk_space())
    check_tracker(run.training, folder)
    accelerator = make_accelerator(replace(run.training, log_with=None))
    reset_peak_memory(accelerator.device)
    with rehearsing() as phases:
        task, _, _ = run.work(accelerator, None, None, resume=False, intended=folder)
    result, _ = run.result(task)
    if verify and can_judge(pipe):
        began = time.perf_counter()
        run.check(result)
        phases.append(Phase("check the result", 1, time.perf_counter() - began))
    return Plan(
        method=method,
        concept=run.concept.name,
        part=run.config.part,
        model=task.family.origin or task.family.label,
        trained=run.trained,
        weights=sum(parameter.numel() for parameter in run.part.parameters()),
        processes=accelerator.num_processes,
        device=str(accelerator.device),
        memory_mb=peak_memory_mb(accelerator.device),
        disk_mb=run.disk_space() / 1e6,
        phases=tuple(phases),
    )


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
        "beside_fingerprint": task.identity["beside"],
        "result_fingerprint": storage.fingerprint(task.model.named_parameters()),
        "processes": task.accelerator.num_processes,
        "device": str(device),
        "peak_memory_mb": round(peak_memory_mb(device), 1),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }
