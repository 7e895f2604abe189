"""Unlearning as one call: a pipeline, a concept and a method in, an unlearned pipeline out.

``unlearn`` does what every method needs around its objective: it resolves the concept, checks everything that can be
checked before the long work, provides the examples, copies the denoiser, runs the method, and writes a result that
stock diffusers loads, with a manifest beside it.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import json
import platform
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from sfumato import concepts, recipes, storage
from sfumato.families import StableDiffusion, family_of
from sfumato.settings import check_types
from sfumato.trainer import TrainingConfig, make_accelerator, preflight
from sfumato.unlearning.examples import Examples, draw_examples, read_image_folder

__all__ = ["METHODS", "ExampleConfig", "method_config", "unlearn"]

METHODS = {"salun": ("sfumato.unlearning.salun", "SalUnConfig")}
"""Method to its module, which has ``check`` and ``run``, and the name of its config there."""


@dataclass
class ExampleConfig:
    """Where forget and retain pictures come from.

    Attributes:
        forget_images: Folder with pictures of the concept; None lets the model draw them.
        retain_images: Folder with pictures to keep; None lets the model draw them.
        forget_examples: How many forget pictures to draw.
        retain_examples: How many retain pictures to draw.
        example_steps: Sampler steps of a drawn picture.
        example_guidance: Guidance scale of a drawn picture.
        example_batch_size: Pictures drawn or encoded at a time.
    """

    forget_images: str | None = None
    retain_images: str | None = None
    forget_examples: int = 800
    retain_examples: int = 800
    example_steps: int = 50
    example_guidance: float = 7.5
    example_batch_size: int = 8

    def __post_init__(self) -> None:
        """Check what would only fail after the long work has begun."""
        check_types(self)
        for name in ("forget_examples", "retain_examples", "example_steps", "example_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for folder in (self.forget_images, self.retain_images):
            if folder is not None and not Path(folder).is_dir():
                raise FileNotFoundError(f"There is no image folder {folder}.")


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
    **settings: Any,
) -> DiffusionPipeline:
    """Make a pipeline forget a concept.

    Args:
        pipe: The model. Its weights are not changed; it is moved to the training device.
        forget: What to forget, a phrase or several.
        method: One of `METHODS`.
        anchor: What to show instead; see `sfumato.concepts.resolve` for the default.
        retain: Prompts that must keep their meaning; likewise.
        output_dir: Where to write the result, mask, manifest and logs; None keeps it all in memory.
        resume: Continue a run in `output_dir` that was cut short.
        recipe: A YAML file of settings; default is the model's own recipe, if it has one.
        **settings: Any field of the method's config, `ExampleConfig` or `TrainingConfig`; they override the recipe.

    Returns:
        A new pipeline of the same kind, which shares every component with `pipe` but the denoiser.

    Raises:
        ValueError: If the family, method, concept or a setting is unknown, the sets contradict each other, or the
            text encoder and the denoiser have different dtypes.
        FileExistsError: If `output_dir` already holds a result.
        NonFiniteLossError: If the loss or a weight becomes NaN or infinite.
    """
    began = time.perf_counter()
    family = family_of(pipe)
    family.check_dtypes()
    config_class = method_config(method)
    concept = concepts.resolve(pipe, forget, anchor=anchor, retain=retain)
    chosen = {**recipes.settings_for(method, pipe, recipe), **settings}
    config, sources, training = _configure((config_class, ExampleConfig, TrainingConfig), chosen)
    names = family.trainable_parameters(config.parameters)
    folder = storage.check_output_dir(output_dir, resume=resume) if output_dir is not None else None
    if folder is not None:
        storage.check_disk_space(folder, 2 * _size_of(pipe))
    identity = {
        "method": method, "forget": concept.name, "concept": asdict(concept), "settings": asdict(config),
        "base": storage.fingerprint(family.denoiser.named_parameters()), "examples": asdict(sources),
    }  # fmt: skip
    accelerator = make_accelerator(training, folder)
    denoiser = _trainable_copy(family, names)
    implementation = importlib.import_module(METHODS[method][0])
    implementation.check(config, denoiser, identity)
    preflight(
        denoiser, config.batch_size, training, accelerator=accelerator, output_dir=folder, identity=identity,
        resume=resume,
    )  # fmt: skip
    pipe.to(accelerator.device)
    store = folder / "examples" if folder else None
    sets = _example_sets(family, concept, sources, training.seed, store, identity, accelerator)
    history, facts = implementation.run(
        family, denoiser, concept, *sets, config, training, identity=identity, output_dir=folder, resume=resume,
        accelerator=accelerator,
    )  # fmt: skip
    denoiser.requires_grad_(False).to(next(family.denoiser.parameters()).dtype)
    result = family.with_denoiser(denoiser)
    if folder is not None and accelerator.is_main_process:
        settings_used = {**asdict(config), **asdict(sources), **asdict(training)}
        manifest = _manifest(concept, method, settings_used, facts, str(identity["base"]), denoiser, accelerator)
        manifest["seconds"] = round(time.perf_counter() - began, 1)
        _write_result(result, concepts.vocabulary_of(pipe), folder, history, manifest)
    accelerator.wait_for_everyone()
    return result


def method_config(method: str) -> Any:
    """Give the config class of a method; ValueError, naming those there are, if it is unknown."""
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}; choose from {', '.join(METHODS)}.")
    module, name = METHODS[method]
    return getattr(importlib.import_module(module), name)


def _configure(classes: Sequence[Any], settings: Mapping[str, Any]) -> list[Any]:
    """Share settings out among config classes by field name."""
    known = {field.name for cls in classes for field in fields(cls)}
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"Unknown setting {name!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
    return [cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings}) for cls in classes]


def _example_sets(
    family: StableDiffusion, concept: concepts.Concept, sources: ExampleConfig, seed: int, store: Path | None,
    identity: Mapping[str, Any], accelerator: Accelerator,
) -> tuple[Examples, Examples]:  # fmt: skip
    """Provide the forget and retain sets: from folders, from an earlier start of this run, or drawn by the model."""
    parts = []
    for stream, (kind, images, prompts, count) in enumerate(
        (
            ("forget", sources.forget_images, concept.prompts, sources.forget_examples),
            ("retain", sources.retain_images, concept.retain, sources.retain_examples),
        )
    ):
        path = store / f"{kind}.safetensors" if store else None
        key = {"base": identity["base"], "source": identity["examples"], "prompts": list(prompts), "seed": seed}
        if images is not None:
            parts.append(read_image_folder(family, images, prompts, batch_size=sources.example_batch_size))
            continue
        stored = _stored_examples(path)
        if path is not None and stored.get("key") == key:
            latents = storage.load_tensors(path)["latents"]
            parts.append(Examples(latents, torch.zeros_like(latents), tuple(stored["shown"])))
            continue
        drawn = draw_examples(
            family, prompts, count, key=(seed, 7, stream), num_inference_steps=sources.example_steps,
            guidance_scale=sources.example_guidance, batch_size=sources.example_batch_size,
            accelerator=accelerator, description=f"draw {kind} set",
        )  # fmt: skip
        if path is not None and accelerator.is_main_process:
            storage.save_tensors(path, {"latents": drawn.mean}, {"key": key, "shown": drawn.prompts})
        parts.append(drawn)
        accelerator.wait_for_everyone()
    return parts[0], parts[1]


def _stored_examples(path: Path | None) -> dict[str, Any]:
    """What an earlier start of this run wrote beside its examples; nothing if it is absent or damaged."""
    try:
        return storage.read_metadata(path) if path is not None else {}
    except (FileNotFoundError, ValueError):
        return {}


def _trainable_copy(family: StableDiffusion, names: Sequence[str]) -> torch.nn.Module:
    denoiser = copy.deepcopy(family.denoiser).float().eval()
    wanted = set(names)
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(name in wanted)
    return denoiser


def _size_of(pipe: DiffusionPipeline) -> int:
    modules = (part for part in pipe.components.values() if isinstance(part, torch.nn.Module))
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def _manifest(
    concept: concepts.Concept, method: str, settings: Mapping[str, Any], facts: Mapping[str, Any], base: str,
    denoiser: torch.nn.Module, accelerator: Accelerator,
) -> dict[str, Any]:  # fmt: skip
    packages = ("sfumato", "torch", "diffusers", "transformers", "accelerate", "safetensors")
    return {
        "method": method,
        "forget": concept.name,
        "anchors": sorted(set(concept.anchors)),
        "retain_prompts": len(concept.retain),
        "settings": dict(settings),
        **facts,
        "base_fingerprint": base,
        "result_fingerprint": storage.fingerprint(denoiser.named_parameters()),
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "peak_memory_mb": round(peak_memory_mb(accelerator.device), 1),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def peak_memory_mb(device: torch.device) -> float:
    """Give the peak memory of this process so far, in megabytes: the accelerator's if there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    scale = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def _write_result(
    pipe: DiffusionPipeline, vocabulary: concepts.Vocabulary | None, folder: Path, history: list[dict[str, float]],
    manifest: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write the pipeline into `folder`; its index comes last, so a folder that loads is complete."""
    with storage.atomic_directory(folder / "result") as partial:
        pipe.save_pretrained(partial, safe_serialization=True)
        if vocabulary is not None:
            storage.write_text(partial / concepts.VOCABULARY_FILE, vocabulary.as_json())
        storage.write_text(partial / "history.json", json.dumps(history))
        storage.write_text(partial / "manifest.json", json.dumps(manifest, indent=1))
    parts = sorted((folder / "result").iterdir(), key=lambda path: path.name == "model_index.json")
    for part in parts:
        target = folder / part.name
        if target.is_dir():
            shutil.rmtree(target)
        part.replace(target)
    (folder / "result").rmdir()
    for leftover in ("checkpoints", "examples"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
