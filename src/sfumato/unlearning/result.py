"""What a run leaves in its output folder: the whole pipeline, or what changed of it, with a manifest beside it.

* ``full``: the pipeline, which stock diffusers loads from the folder;
* ``part``: the changed component alone, a text encoder or a denoiser, in a folder of its name, for
  ``CLIPTextModel.from_pretrained(folder / "text_encoder")`` and its like;
* ``delta``: the changed weights, in ``delta/``, with the file that applies them and takes them back; see
  `sfumato.delta`;
* ``lora``: their low-rank approximation, in ``lora/``; see `sfumato.lora`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from sfumato import concepts, delta, storage
from sfumato.lora import Lora, require_loader, save_lora
from sfumato.settings import check_types

__all__ = ["FORMATS", "OutputConfig", "check_output", "differ", "write_result"]

FORMATS = ("full", "part", "delta", "lora")


@dataclass
class OutputConfig:
    """What to save.

    Attributes:
        save: ``"full"``, ``"part"``, ``"delta"`` or ``"lora"``, or several of them; see `sfumato.unlearning.result`.
        lora_rank: Of a LoRA.
    """

    save: list[str] = field(default_factory=lambda: ["full"], metadata={"nargs": "+"})
    lora_rank: int = 32

    def __post_init__(self) -> None:
        """Check the names and the rank."""
        if isinstance(self.save, str):
            self.save = [self.save]
        check_types(self)
        unknown = [name for name in self.save if name not in FORMATS]
        if unknown or not self.save:
            wrong = repr(unknown[0]) if unknown else "nothing"
            raise ValueError(f"`save` takes {', '.join(FORMATS)}, got {wrong}.")
        if self.lora_rank < 1:
            raise ValueError(f"`lora_rank` must be at least 1, got {self.lora_rank}.")


def check_output(pipe: DiffusionPipeline, part: torch.nn.Module, config: OutputConfig) -> None:
    """Refuse, before the long work, what can't be saved.

    Args:
        pipe: The model.
        part: The part of it that will change.
        config: What to save.

    Raises:
        ValueError: If stock diffusers has no LoRA for the part.
    """
    if "lora" in config.save:
        inside = {id(module) for module in part.modules()}
        for name, component in pipe.components.items():
            if id(component) in inside:
                require_loader(pipe, name)


def write_result(
    base: DiffusionPipeline, result: DiffusionPipeline, folder: Path, config: OutputConfig,
    history: list[dict[str, float]], manifest: Mapping[str, Any], lora: Lora | None = None,
) -> None:  # fmt: skip
    """Write what was asked for into `folder`, each file whole or not at all.

    Args:
        base: The original.
        result: The unlearned model.
        folder: The run's output folder; what the run left there on its way is removed.
        config: What to save.
        history: The losses, a row a step.
        manifest: What was done.
        lora: The LoRA, if one is to be saved and anything changed.
    """
    with storage.atomic_directory(folder / "result") as partial:
        saved = _save(base, result, partial, config, manifest, lora)
        storage.write_text(partial / "history.json", json.dumps(history))
        facts = {**manifest, "saved": saved, "originals": _originals(base, result)}
        storage.write_text(partial / "manifest.json", json.dumps(facts, indent=1))
    last = "model_index.json" if "full" in config.save else "manifest.json"  # it says that all is there
    storage.put_in_place(folder / "result", last)
    for leftover in ("checkpoints", "examples"):
        shutil.rmtree(folder / leftover, ignore_errors=True)


def _originals(base: DiffusionPipeline, result: DiffusionPipeline) -> dict[str, dict[str, str]]:
    """What tells the components that changed, as they were before, from another model's."""
    before = {name: part for name, part in base.components.items() if part is not result.components[name]}
    return {
        name: {"dtype": str(part.dtype), "fingerprint": storage.fingerprint(part.named_parameters())}
        for name, part in before.items()
    }


def _save(
    base: DiffusionPipeline, result: DiffusionPipeline, folder: Path, config: OutputConfig,
    manifest: Mapping[str, Any], lora: Lora | None,
) -> dict[str, Any]:  # fmt: skip
    """Write the formats; gives what the manifest says of each."""
    saved: dict[str, Any] = {}
    if "full" in config.save:
        result.save_pretrained(folder, safe_serialization=True)
        vocabulary = concepts.vocabulary_of(base)
        if vocabulary is not None:
            storage.write_text(folder / concepts.VOCABULARY_FILE, vocabulary.as_json())
        saved["full"] = {}
    if "part" in config.save:
        changed = [name for name, part in result.components.items() if part is not base.components[name]]
        for name in changed:
            if not (folder / name).exists():  # the whole pipeline has it
                result.components[name].save_pretrained(folder / name, safe_serialization=True)
        saved["part"] = {"components": changed}
    if "delta" in config.save:
        saved["delta"] = None  # unless something changed, as with the LoRA
        if differ(base, result):
            (folder / "delta").mkdir()
            facts = {name: manifest[name] for name in ("method", "forget", "model") if name in manifest}
            weights = delta.save_delta(folder / "delta" / "delta.safetensors", base, result, facts)
            shutil.copy(delta.__file__, folder / "delta" / "delta.py")
            saved["delta"] = {"changed_weights": weights}
    if "lora" in config.save:
        saved["lora"] = None
        if lora is not None:
            save_lora(result, lora, folder / "lora")
            saved["lora"] = {"rank": lora.rank, "missing": lora.missing}
    return saved


def differ(base: DiffusionPipeline, result: DiffusionPipeline) -> bool:
    """Whether any weight of a component that two pipelines do not share is another in them."""
    return any(
        not torch.equal(a, b.to(a))
        for name, part in result.components.items()
        if isinstance(part, torch.nn.Module) and part is not base.components[name]
        for a, b in zip(part.parameters(), base.components[name].parameters(), strict=True)
    )
