"""Training beside a model as one job: what ``training/one_more_step.py`` and ``minority_classifier.py`` share.

The model stays as it is; a small network learns from pictures of its kind, in its latents. A method brings the network
and its objective; the pictures, the loop and the result are the same for all. The output folder is what
``from_pretrained`` of the method loads, with ``manifest.json`` (settings, seed, versions, fingerprints), the history
of the loss, and a card.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from sfumato import jobs, loading, storage
from sfumato.families import Family, family_of
from sfumato.guidance.card import make_card
from sfumato.guidance.networks import NetworkConfig
from sfumato.guidance.pictures import Captioned, pictures_for
from sfumato.memory import explained
from sfumato.settings import check_ranges, check_types
from sfumato.trainer import Objective, TrainingConfig, make_accelerator, preflight, train
from sfumato.unlearning.examples import Examples, encode_pictures

__all__ = ["PARTS_FOLDER", "SCORES_FILE", "JobConfig", "Materials", "Method", "main", "train_guidance"]

SCORES_FILE = "scores.safetensors"
PARTS_FOLDER = "scores"
OWN_FILES = storage.JOB_FILES | {SCORES_FILE, PARTS_FOLDER}
ENCODED = 64  # pictures at a time


@dataclass
class JobConfig:
    """Which model to learn beside, what from, and where the result goes.

    Attributes:
        output: Folder for the result; a finished one in it is never overwritten.
        model: The model: an embedded one, a local folder or a Hub id.
        data: ``atelier``, what the embedded models learned from (renders of Fashion-MNIST with captions, of the pixel
            model grey garments with their classes), or a folder of pictures, with their captions, or names of
            classes, in its ``metadata.jsonl``.
        data_dir: Of ``atelier``: folder with Fashion-MNIST's four ``*-ubyte.gz`` files; None looks for Debian's
            package, then the Hub.
        pictures: Of ``atelier``: take so many, each another garment; None takes one of every garment.
        batch_size: Pictures of a step, on all processes together.
        save_dtype: Precision of the weights that are saved at the end.
        config: A YAML file of settings; those of the command line go before it.
        resume: Continue a run that was cut short.
    """

    output: str = field()
    model: str = "atelier"
    data: str = "atelier"
    data_dir: str | None = None
    pictures: int | None = None
    batch_size: int = 64
    save_dtype: str = field(default="float32", metadata={"choices": jobs.DTYPES})
    config: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_types(self)
        check_ranges(self, {"pictures": 2, "batch_size": 1})


@dataclass(frozen=True)
class Materials:
    """What a method learns from.

    Attributes:
        family: The model's, on the device of the run.
        pictures: Where the examples come from.
        examples: The pictures as latents.
        facts: What tells model and pictures from others, as JSON can hold it.
        batch_size: Pictures of a step.
        seed: Of the run.
        accelerator: The process group.
        folder: Of the run.
    """

    family: Family
    pictures: Captioned
    examples: Examples
    facts: Mapping[str, Any]
    batch_size: int
    seed: int
    accelerator: Accelerator
    folder: Path


class Method(Protocol):
    """What is trained."""

    name: str
    """As the manifest says it."""
    settings: Any
    """Its config."""

    def check(self, family: Family, pictures: Captioned) -> None:
        """Raise a ValueError for a model, or pictures, that it can't be trained for."""
        ...

    def network(self, family: Family, config: NetworkConfig) -> Any:
        """Make the network, untrained."""
        ...

    def objective(self, materials: Materials) -> Objective:
        """Make the objective; all processes call it."""
        ...

    def result(self, model: Any, family: Family) -> Any:
        """Give what `save_pretrained` writes."""
        ...

    def measure(self, model: Any, materials: Materials) -> dict[str, Any]:
        """Say how well the trained network does, as JSON can hold it; the first process calls it."""
        ...


def main(
    method: type[Any], settings: type[Any], training: Mapping[str, Any], description: str,
    arguments: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Train from a command line; see `sfumato.jobs.main`.

    Args:
        method: Makes the method of its config.
        settings: The method's config dataclass.
        training: The method's defaults of `TrainingConfig`.
        description: Of the command.
        arguments: The command line; None takes the process's own.
    """

    def job(asked: JobConfig, network: NetworkConfig, own: Any, how: TrainingConfig) -> None:
        train_guidance(method(own), asked, network, how)

    jobs.main((JobConfig, NetworkConfig, settings, TrainingConfig), training, job, description, arguments)


def train_guidance(method: Method, job: JobConfig, network: NetworkConfig, training: TrainingConfig) -> Any:
    """Train a network beside a model.

    Args:
        method: What is trained.
        job: Which model, what from, and where the result goes.
        network: What the network looks like.
        training: How to train it.

    Returns:
        The result, with the weights that were saved, on the CPU.

    Raises:
        ValueError: If settings, model and pictures do not fit together, a picture is broken, or the checkpoint to
            resume from is of another run.
        FileNotFoundError: If there is no such model, or there are no pictures.
        FileExistsError: If the output folder already holds a result, or other files.
        OSError: If it can't be written or its disk is full.
        ImportError: If an optional package that a setting asks for is missing.
        NonFiniteLossError: If the loss or a weight becomes NaN or infinite.
        MemoryError: If the memory does not suffice; the last checkpoint is kept.
    """
    began = time.perf_counter()
    folder = storage.check_output_dir(job.output, resume=job.resume, own=OWN_FILES)
    family = family_of(loading.load(job.model))
    pictures = pictures_for(family, job.data, job.data_dir, job.pictures, training.seed)
    method.check(family, pictures)
    model = jobs.untrained(lambda: method.network(family, network), training.seed)
    with storage.claimed(folder if jobs.is_first() else None, resume=job.resume, own=OWN_FILES):
        accelerator = make_accelerator(training, folder)
        parts = family.networks
        for part in parts.values():
            part.to(accelerator.device).requires_grad_(False)
        prints = {name: storage.fingerprint(part.named_parameters()) for name, part in parts.items()}
        facts = {"model": prints, "pictures": pictures.facts()}
        identity = {
            "method": method.name, "settings": asdict(method.settings), "shape": asdict(network),
            "network": storage.fingerprint(model.named_parameters()), **facts,
        }  # fmt: skip
        common: dict[str, Any] = {"identity": identity, "output_dir": folder, "accelerator": accelerator}
        preflight(model, job.batch_size, training, resume=job.resume, **common)
        with explained(accelerator.device, folder, {"batch_size", *asdict(training)}):
            examples = encode_pictures(family, pictures.take, pictures.captions, batch_size=ENCODED)
            materials = Materials(
                family, pictures, examples, facts, job.batch_size, training.seed, accelerator, folder
            )  # fmt: skip
            objective = method.objective(materials)
            history = train(model, objective, training, resume=job.resume, description=method.name, **common)
            nn.Module.to(model.eval(), accelerator.device)
            measured = method.measure(model, materials) if accelerator.is_main_process else {}
        nn.Module.to(model, "cpu", getattr(torch, job.save_dtype))
        result = method.result(model, family)
        if accelerator.is_main_process:
            configs = {"job": job, "network": network, "method": method.settings, "training": training}
            manifest = {
                "method": method.name, "beside": family.origin, "family": family.label, **facts, "measured": measured,
                **jobs.manifest_of(model, configs, accelerator, time.perf_counter() - began),
            }  # fmt: skip
            _write(folder, result, history, manifest)
        accelerator.wait_for_everyone()
    return result


def _write(folder: Path, result: Any, history: list[dict[str, float]], manifest: Mapping[str, Any]) -> None:
    """Write the result, and put it in its place whole."""
    with storage.atomic_directory(folder / "result") as partial:
        result.save_pretrained(partial)
        storage.write_text(partial / "history.json", json.dumps(history))
        storage.write_text(partial / "manifest.json", json.dumps(manifest, indent=1))
        storage.write_text(partial / "README.md", make_card(manifest))
    storage.put_in_place(folder / "result", "manifest.json")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
