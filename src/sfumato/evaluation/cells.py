"""The cells of a benchmark: one run of one method on one concept with one seed, evaluated and attacked.

A cell has a folder of its own, named by what its run depends on, and in it the result, the evaluations and the
attacks, each named by its settings. What is there is whole and is never made again; what failed is noted, with what
was said.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline

from sfumato import concepts, loading, recipes, storage
from sfumato.attacks.audit import RESULT_FILE as ATTACK_FILE
from sfumato.attacks.audit import attack
from sfumato.evaluation.detectors import find_detector
from sfumato.evaluation.evaluate import RESULT_FILE, EvaluationConfig, evaluate, release_bytes
from sfumato.evaluation.fingerprints import scheduler_facts
from sfumato.evaluation.pictures import Request, draw_pictures
from sfumato.evaluation.scores import read_sightings
from sfumato.unlearning.methods import METHODS

__all__ = ["Bench", "Cell", "cells_beside", "run_cell"]

FAILURES_FILE, EXAMPLES_FILE, ROW_FILE = "failed.json", "examples.safetensors", "cell.json"
FORGET_EXAMPLES, RETAIN_EXAMPLES, EXAMPLE_SIDE = 6, 9, 128
COSTS = ("seconds", "peak_memory_mb", "denoiser_evaluations")


@dataclass(frozen=True)
class Bench:
    """What all cells share.

    Attributes:
        folder: The benchmark's output folder.
        model: The original's name.
        pipe: The original, on its device.
        fingerprint: Of the original.
        evaluation: How results are evaluated, but for the seed.
        attacks: Attack to all its settings, but for the seed.
        recipe: A recipe's file or name, ``{}`` standing for the method; None takes the model's own.
        steps: Overrides the recipes' optimiser steps.
        save: The format of the results.
        retry: Whether to try once more what failed.
    """

    folder: Path
    model: str
    pipe: DiffusionPipeline
    fingerprint: str
    evaluation: EvaluationConfig
    attacks: Mapping[str, Mapping[str, Any]]
    recipe: str | None = None
    steps: int | None = None
    save: str = "delta"
    retry: bool = False

    @property
    def judged_by(self) -> str:
        """What tells how results are evaluated, wherever that is and whatever the seed."""
        evaluation = {**asdict(self.evaluation), "seed": None, "cache": None, "device": None}
        return digest({"evaluation": evaluation, "recipe": self.recipe, "steps": self.steps})

    def recipe_of(self, method: str, phrases: list[str]) -> recipes.Recipe:
        """Find the recipe of a cell; raises as `sfumato.recipes.find_recipe` does."""
        return recipes.find_recipe(method, self.pipe, phrases, self.recipe and self.recipe.replace("{}", method))


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        bench: What it shares with the others.
        method: Forgets.
        concept: Is forgotten; several phrases are joined by ``+``.
        seed: Of the training, the pictures and the attacks.
    """

    bench: Bench
    method: str
    concept: str
    seed: int

    @property
    def phrases(self) -> list[str]:
        """What is forgotten together."""
        return [phrase.strip() for phrase in self.concept.split("+")]

    @property
    def neighbours(self) -> list[str] | None:
        """Of the words that must stay, those that are not forgotten."""
        words = self.bench.evaluation.neighbours or []
        return [word for word in words if word not in self.phrases] or None

    @property
    def kind(self) -> str:
        """The domain that the concept is reported in; of a model without a vocabulary all are of one."""
        vocabulary = concepts.vocabulary_of(self.bench.pipe)
        return "concept" if vocabulary is None else concepts.kind_of(vocabulary, self.phrases)

    @cached_property
    def folder(self) -> Path:
        """Where all of it is kept: another run, and another scheduler, has another folder."""
        bench, recipe = self.bench, self.bench.recipe_of(self.method, self.phrases)
        steps = bench.steps if METHODS[self.method].trains else None
        made_by = {
            "model": bench.fingerprint, **scheduler_facts(bench.pipe), "method": self.method,
            "forget": self.phrases, "seed": self.seed, "settings": dict(recipe.settings), "steps": steps,
            "save": bench.save, "dtype": bench.evaluation.dtype,
        }  # fmt: skip
        name = re.sub(r"[^a-z0-9]+", "-", self.concept.lower()).strip("-")[:40]
        return bench.folder / "cells" / f"{self.method}-{name}-{self.seed}-{digest(made_by)}"

    @property
    def command(self) -> list[str]:
        """What the run's process is told, after the name of the program."""
        bench, trains = self.bench, METHODS[self.method].trains
        return [
            "unlearn", self.method, "--forget", *self.phrases, "--model", bench.model, "--dtype",
            bench.evaluation.dtype, "--output", str(self.folder / "model"), "--save", bench.save, "--no_verify",
            *(["--recipe", bench.recipe.replace("{}", self.method)] if bench.recipe else []),
            *(["--seed", str(self.seed)] if trains else []),
            *(["--steps", str(bench.steps)] if trains and bench.steps else []),
        ]  # fmt: skip

    @cached_property
    def unlearned(self) -> DiffusionPipeline:
        """The result, on the original's device."""
        dtype = getattr(torch, self.bench.evaluation.dtype)
        return loading.load_result(self.folder / "model", self.bench.model, dtype=dtype).to(self.bench.pipe.device)


def digest(facts: Mapping[str, Any]) -> str:
    """Give eight hexadecimal digits that tell settings apart."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:8]


def run_cell(cell: Cell, say: Callable[[str], None]) -> dict[str, Any]:
    """Do what of a cell is not done yet.

    Args:
        cell: The cell.
        say: Is told what begins.

    Returns:
        All that is known of it, as JSON can hold it: ``failed`` maps a stage to what went wrong in it.

    Raises:
        BlockingIOError: If a training that a killed benchmark has left is still at it.
        OSError: If the disk is full, or the like: that is no failure of the method.
    """
    row = _row(cell, say)
    _note(cell, row)
    cell.__dict__.pop("unlearned", None)  # the memory is the next cell's
    return row


def _row(cell: Cell, say: Callable[[str], None]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "method": cell.method, "concept": cell.concept, "seed": cell.seed, "kind": cell.kind,
        "folder": str(cell.folder.relative_to(cell.bench.folder)), "failed": {}, "evaluation": None, "attacks": {},
        "command": shlex.join(["sfumato", *cell.command]),
    }  # fmt: skip
    found, message = _once(cell, "unlearn", lambda: _unlearn(cell, say))
    if message is not None:
        return {**row, "failed": {"unlearn": message}}
    row |= found
    cache = str(cell.bench.folder / "pictures")
    evaluating = replace(cell.bench.evaluation, seed=cell.seed, cache=cache, neighbours=cell.neighbours)
    folder = cell.folder / f"evaluation-{digest({**asdict(evaluating), 'cache': None, 'device': None})}"
    found, message = _once(cell, folder.name, lambda: _evaluation(cell, evaluating, folder, say))
    if message is None:
        row |= {"evaluation": found, "examples": str(folder.relative_to(cell.bench.folder))}
    else:
        row["failed"]["evaluation"] = message
    for name, settings in cell.bench.attacks.items():
        given = {**settings, "seed": cell.seed}
        into = cell.folder / f"attack-{name}-{digest({**given, 'detector': evaluating.detector})}"
        found, message = _once(cell, into.name, partial(_attack, cell, name, given, into, say))
        if message is None:
            row["attacks"][name] = found
        else:
            row["failed"][f"attack {name}"] = message
    return row


def cells_beside(bench: Bench, named: Sequence[Cell]) -> list[dict[str, Any]]:
    """Give what is known of cells that lie in the folder, made and evaluated alike, but are not named.

    Args:
        bench: What they must share; attacks that are not its own, or have other settings, are left out of them.
        named: Those of this call.

    Returns:
        A row each, as `run_cell` gives it, by their folders' names.
    """
    names, rows = {cell.folder.name for cell in named}, []
    for file in sorted((bench.folder / "cells").glob(f"*/{ROW_FILE}")):
        try:
            stored = storage.read_json(file)
            row, made_by = stored["row"], stored["attacks"]
            cell = Cell(bench, row["method"], row["concept"], row["seed"])
            alike = stored["judged_by"] == bench.judged_by and cell.folder.name == file.parent.name
        except (ValueError, KeyError, TypeError):  # damaged, or by a recipe that is gone
            continue
        if alike and file.parent.name not in names:
            same = {name for name, settings in bench.attacks.items() if made_by.get(name) == dict(settings)}
            rows.append({**row, "attacks": {name: found for name, found in row["attacks"].items() if name in same}})
    return rows


def _note(cell: Cell, row: Mapping[str, Any]) -> None:
    """Keep a row with what it was made by, for later leaderboards."""
    attacks = {name: dict(settings) for name, settings in cell.bench.attacks.items()}
    text = json.dumps({"judged_by": cell.bench.judged_by, "attacks": attacks, "row": row}, indent=1)
    path = cell.folder / ROW_FILE
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        storage.write_text(path, text)


def _once(cell: Cell, key: str, work: Callable[[], Any]) -> tuple[Any, str | None]:
    """Do a stage, unless it failed before: gives what it found, or what went wrong."""
    path = cell.folder / FAILURES_FILE
    failures = storage.read_json(path) if path.exists() else {}
    if key in failures and not cell.bench.retry:
        return None, str(failures[key])
    try:
        found = work()
    except (RuntimeError, ValueError) as error:  # of the method or attack; a full disk, an OSError, is not
        message = " ".join(str(error).split())
        storage.write_text(path, json.dumps({**failures, key: message}, indent=1))
        return None, message
    if failures.pop(key, None) is not None:
        storage.write_text(path, json.dumps(failures, indent=1))
    return found, None


def _unlearn(cell: Cell, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the job, in a process of its own; gives what it cost."""
    folder = cell.folder / "model"
    if not (folder / "manifest.json").exists() or (folder / "result").exists():
        with storage.locked(folder) as free:
            if not free:  # left by a benchmark that was killed
                raise BlockingIOError(f"A training is still writing into {folder}.")
        say("unlearns")
        _run([*cell.command, *(["--resume"] if folder.exists() else [])], cell.bench.pipe.device)
    manifest = storage.read_json(folder / "manifest.json")
    return {
        "costs": {**{name: manifest.get(name) for name in COSTS}, "release_bytes": release_bytes(folder)},
        "recipe": manifest.get("recipe"), "device": manifest.get("device"), "versions": manifest.get("versions"),
    }  # fmt: skip


def _run(arguments: list[str], device: torch.device) -> None:
    """Run a command of sfumato on a device; a RuntimeError says what it ended with."""
    command = [sys.executable, "-m", "sfumato.cli", *arguments]
    # A session of its own: an interruption must reach what it may have started too.
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
        start_new_session=True, env={**os.environ, **placed_on(device, os.environ.get("CUDA_VISIBLE_DEVICES"))},
    ) as process:  # fmt: skip
        try:
            _, said = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    lines = [line for line in said.splitlines() if line.strip()]
    last = lines[-1].removeprefix("error: ").strip() if lines else "it said nothing"
    if process.returncode < 0:
        raise RuntimeError(f"The process was ended by {signal.Signals(-process.returncode).name}; is memory short?")
    if process.returncode:
        raise RuntimeError(last)


def placed_on(device: torch.device, visible: str | None) -> dict[str, str]:
    """Give the environment variables that make a job, which takes the first accelerator it sees, run on a device.

    Args:
        device: The device.
        visible: ``CUDA_VISIBLE_DEVICES`` here.
    """
    if device.type == "cpu":
        return {"ACCELERATE_USE_CPU": "true"}
    if device.type != "cuda" or device.index is None:
        return {}
    listed = [name for name in (visible or "").split(",") if name.strip()]
    return {"CUDA_VISIBLE_DEVICES": listed[device.index].strip() if listed else str(device.index)}


def _evaluation(cell: Cell, config: EvaluationConfig, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Evaluate the result, and keep some of the pictures to show."""
    if not (folder / RESULT_FILE).exists():
        say("is evaluated")
        settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
        evaluate(cell.unlearned, cell.bench.pipe, forget=cell.phrases, output_dir=folder, resume=True, **settings)
    found = storage.read_json(folder / RESULT_FILE)
    if not (folder / EXAMPLES_FILE).exists():
        _keep_examples(cell, found["settings"], folder)
    return found


def _keep_examples(cell: Cell, settings: Mapping[str, Any], folder: Path) -> None:
    """Keep pictures of the same prompts and seeds by the original and the result; all of them are in the cache."""
    asked: list[Request] = []
    for kind, count in (("forget", FORGET_EXAMPLES), ("retain", RETAIN_EXAMPLES)):
        seen = [s.request for s in read_sightings(folder) if s.model == "result" and s.kind == kind]
        each = list({request.prompt: request for request in reversed(seen)}.values())[::-1]
        asked += [each[k * len(each) // count] for k in range(count)] if len(each) > count else each
    drawn = {}
    for name, pipe in (("original", cell.bench.pipe), ("result", cell.unlearned)):
        pictures = draw_pictures(
            pipe, asked, num_inference_steps=settings["num_inference_steps"], cache=settings["cache"],
            guidance_scale=settings["guidance_scale"], batch_size=settings["batch_size"], description=None,
        )  # fmt: skip
        if pictures.shape[-1] > EXAMPLE_SIDE:
            size = (round(pictures.shape[-2] * EXAMPLE_SIDE / pictures.shape[-1]), EXAMPLE_SIDE)
            pictures = F.interpolate(pictures, size=size, mode="area")
        drawn[name] = (255 * pictures).round().to(torch.uint8)
    storage.save_tensors(folder / EXAMPLES_FILE, drawn, {"prompts": [request.prompt for request in asked]})


def _attack(
    cell: Cell, method: str, settings: Mapping[str, Any], folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Attack the result, or go on with it."""
    if not (folder / ATTACK_FILE).exists():
        say(f"is attacked ({method})")
        eye, device = cell.bench.evaluation.detector, cell.bench.pipe.device
        attack(
            cell.unlearned, cell.bench.pipe, cell.phrases, method, output_dir=folder,
            resume=(folder / "audit.json").exists(), **settings,
            detector=None if eye is None else find_detector(eye, cell.phrases, device=device),
        )  # fmt: skip
    return storage.read_json(folder / ATTACK_FILE)
