"""The benchmark: unlearning methods x concepts x seeds, each evaluated and attacked, and a leaderboard of all.

Every method forgets every concept by its recipe, in a process of its own, so that its memory is its own too. Results
are evaluated from the same noise, and the original's pictures are drawn once for all; then each is attacked, by the
same settings. What is finished stays: a benchmark that was killed goes on with ``--resume``, and so does one that is
asked for more methods, concepts, seeds or attacks; a run by other settings is another cell. The leaderboard shows all
cells of the folder that were made and evaluated by the settings of the call, also those that it does not name. One
that fails, as with a loss that is not finite, is noted as failed, and the rest goes on. Several benchmarks in one
folder, one on each accelerator for instance, share the cells: each takes those that no other is at, and the page of
the last one shows all.

UA, IRA and CRA are those of UnlearnCanvas (Zhang et al., arXiv 2402.11846), and objects, styles and other domains are
reported apart as there; pre-ASR and ASR those of UnlearnDiffAtk (Zhang et al., arXiv 2310.11868).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from sfumato import concepts, loading, storage, terminal
from sfumato.arguments import make_parser
from sfumato.attacks.audit import check_attack
from sfumato.attacks.methods import attack_named
from sfumato.evaluation.cells import Bench, Cell, cells_beside, run_cell
from sfumato.evaluation.detectors import detector_for, find_detector, judge_of
from sfumato.evaluation.evaluate import EvaluationConfig
from sfumato.evaluation.features import clip_scorer, find_features
from sfumato.evaluation.fingerprints import model_fingerprint
from sfumato.evaluation.leaderboard import methods_strip, render_leaderboard
from sfumato.evaluation.metrics import kernel_metric
from sfumato.evaluation.pictures import Request
from sfumato.evaluation.scores import read_sightings
from sfumato.evaluation.standings import as_csv, as_markdown, asked_of, expected, standings
from sfumato.families import StableDiffusion, family_of
from sfumato.settings import check_device, check_ranges, check_seed, check_types
from sfumato.unlearning.methods import METHODS, configure, method_named
from sfumato.unlearning.result import FORMATS

__all__ = ["BenchmarkConfig", "benchmark", "main", "make_job_parser"]

ATTACK_SETTINGS: Mapping[str, Mapping[str, Any]] = {"unlearndiffatk": {"times": 5}}
"""Of the benchmark; attacks that are not named have their own defaults. Ten times fewer times than UnlearnDiffAtk's:
a minute a cell on two CPU cores."""
QUICK_ATTACK_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "embeddings": {"steps": 10},
    "unlearndiffatk": {"times": 1, "iterations": 5},
}
QUICK_PROMPTS = 6
PAGE, RESULTS, TABLE, STRIP = "leaderboard.html", "leaderboard.json", "leaderboard.csv", "methods.png"
OWN_FILES = frozenset({"cells", "pictures", PAGE, RESULTS, TABLE, STRIP})
PACKAGES = ("sfumato", "torch", "diffusers", "transformers", "accelerate")
PATIENCE = 2.0
"""Seconds between looks at cells that another benchmark is at."""


@dataclass
class BenchmarkConfig:
    """What to compare.

    Attributes:
        output: Folder for the leaderboard, the cells and the pictures.
        methods: Comma-separated; all that the model's family has by default.
        concepts: Comma-separated; those to forget together are joined by "+".
        seeds: Of training, pictures and attacks, comma-separated.
        attacks: Comma-separated, or none.
        attack_settings: Settings of the attacks, comma-separated, as in unlearndiffatk.times=50; by default
            UnlearnDiffAtk attacks 5 times, in a tenth of its usual steps, and others do as they do alone.
        attack_count: Prompts of each concept to attack, evenly spread; 24 by default, 6 if quick.
        model: An embedded model, a local folder or a Hub id.
        recipe: A recipe's file or name, {} standing for the method, for instance {}-sd14; the model's own by default.
        training_steps: Overrides the recipes' number of steps, for a trial.
        save: In which format results are kept: full, part, delta or lora.
        resume: Go on with what the folder holds: a benchmark that was cut short, or one that is to have more cells.
        retry: Try once more what failed.
        quick: For a first look: one picture a prompt, half the steps, few prompts and steps of attacks. Training is
            by the recipes all the same.
        forget_repeats: Pictures for each prompt of a concept.
        retain_repeats: Pictures for each other prompt; by default 1 with a vocabulary, else 5.
        num_inference_steps: Sampler steps; by default 20 with a vocabulary, else 50.
        guidance_scale: Classifier-free guidance; by default 3 with a vocabulary, else 7.5.
        batch_size: Pictures, and attacked prompts, at a time; by default 32 with a vocabulary, else 4.
        neighbours: Words that must stay, comma-separated, for a model without a vocabulary, in the place of IRA; each
            concept's are those that are not the concept.
        detector: What tells the concept; see sfumato evaluate.
        features: In what distances are measured; see sfumato evaluate.
        clip: A CLIP to score with how well pictures fit their prompts; none by default.
        real: A folder of real pictures; the shipped renders for the embedded model.
        device: Where to train, evaluate and attack; an accelerator if there is one. Several benchmarks in one folder,
            one on each accelerator, are given cuda:0, cuda:1 and so on.
        dtype: What models are loaded in.
    """

    output: str
    methods: str | None = None
    concepts: str = "sneaker,sketch,red"
    seeds: str = "0"
    attacks: str = "embeddings,unlearndiffatk"
    attack_settings: str | None = None
    attack_count: int | None = None
    model: str = "atelier"
    recipe: str | None = None
    training_steps: int | None = None
    save: str = field(default="delta", metadata={"choices": list(FORMATS)})
    resume: bool = False
    retry: bool = False
    quick: bool = False
    forget_repeats: int = 3
    retain_repeats: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int | None = None
    neighbours: str | None = None
    detector: str | None = None
    features: str | None = None
    clip: str | None = None
    real: str | None = None
    device: str | None = None
    dtype: str = field(default="float32", metadata={"choices": ["float32", "bfloat16", "float16"]})

    def __post_init__(self) -> None:
        """Check what can be checked without the model."""
        check_types(self)
        check_ranges(self, {"attack_count": 1, "training_steps": 1})
        for name in ("methods", "concepts", "seeds", "attacks", "neighbours"):
            value = getattr(self, name)
            if value is not None and not _listed(value):
                raise ValueError(f"`{name}` is empty: name at least one, separated by commas.")
        for method in _listed(self.methods or ""):
            method_named(method)
        for name in self.attack_names:
            attack_named(name)
        for seed in self.seed_numbers:
            check_seed(seed)
        for name, settings in self.settings_of_attacks.items():
            attack_named(name).config(**settings)
        check_device(self.device)

    @property
    def seed_numbers(self) -> list[int]:
        """The seeds as numbers; ValueError if one is none."""
        if not all(seed.isdecimal() for seed in _listed(self.seeds)):
            raise ValueError(f"`seeds` takes whole numbers separated by commas, got {self.seeds!r}.")
        return [int(seed) for seed in _listed(self.seeds)]

    @property
    def settings_of_attacks(self) -> dict[str, dict[str, Any]]:
        """Settings by attack, the defaults of a benchmark too; ValueError if one is none."""
        usual = QUICK_ATTACK_SETTINGS if self.quick else ATTACK_SETTINGS
        found = {name: dict(usual.get(name, {})) for name in self.attack_names}
        for one in _listed(self.attack_settings or ""):
            place, equals, value = one.partition("=")
            name, _, setting = place.strip().partition(".")
            if name not in found or not equals or setting not in attack_named(name).config.__dataclass_fields__:
                raise ValueError(
                    f"`attack_settings` takes ATTACK.SETTING=VALUE, of the attacks {', '.join(found) or 'none'}, got"
                    f" {one!r}; see sfumato attack ATTACK --help."
                )
            found[name][setting] = yaml.safe_load(value)
        return found

    @property
    def attack_names(self) -> list[str]:
        """The attacks' names."""
        return [] if self.attacks == "none" else _listed(self.attacks)


def _listed(text: str) -> list[str]:
    """The different parts of a comma-separated text, in its order."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def make_job_parser(examples: Sequence[str] = ()) -> Any:
    """Make the parser of the command line; see `sfumato.arguments.make_parser`."""
    return make_parser(
        BenchmarkConfig, description="Compare unlearning methods on concepts; see the leaderboard.",
        program="sfumato benchmark", examples=examples,
    )  # fmt: skip


def main(arguments: Sequence[str], examples: Sequence[str] = ()) -> terminal.Answer:
    """Run a benchmark from a command line.

    Args:
        arguments: The command line.
        examples: For ``--help``.

    Returns:
        What it found; as text, its tables in Markdown.
    """
    (config,) = make_job_parser(examples).parse_args_into_dataclasses(list(arguments))
    with terminal.resumable(config.output, "sfumato benchmark", arguments, resume=config.resume):
        found = benchmark(config, command=shlex.join(["sfumato", "benchmark", *arguments]))
    parts = [as_markdown(found["methods"]), as_markdown(found["methods"], pictures=True)]
    if len(found["domains"]) > 1:
        parts += [f"{domain}\n\n{as_markdown(lines)}" for domain, lines in found["domains"].items()]
    for row in found["cells"]:
        for stage, said in row["failed"].items():
            parts.append(f"failed: {row['method']}, {row['concept']}, seed {row['seed']}, {stage}: {said}")
    page = Path(config.output) / PAGE
    return terminal.Answer({"output": str(Path(config.output)), **found}, "\n\n".join([*parts, str(page)]))


def benchmark(config: BenchmarkConfig, *, command: str | None = None) -> dict[str, Any]:
    """Run what is missing of a benchmark, and write its leaderboard.

    Args:
        config: What to compare.
        command: The command line that does the same, for the page.

    Returns:
        The content of ``leaderboard.json``: ``methods``, ``domains`` and ``concepts`` with the pooled lines of their
        tables, ``cells`` with all that is known of each, and ``expected``, the ranges for the recipes.

    Raises:
        ValueError: If a method, concept, attack or setting is unknown or does not fit the model.
        FileExistsError: If the folder holds something else, or a benchmark and `resume` is false.
        OSError: If weights can't be had, or the disk is full.
        ImportError: If a package is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "The benchmark takes no launcher: start the same command several times with --resume, to share its cells."
        )
    folder = Path(config.output)
    storage.check_output_dir(folder, resume=config.resume, own=OWN_FILES)
    bench = _prepared(config, folder)
    cells = _planned(config, bench)
    rows = _run_all(cells)
    with storage.locked(folder, wait=True):
        rows += cells_beside(bench, cells)
        found = _results(config, bench, rows, command)
        storage.write_text(folder / TABLE, as_csv(rows))
        storage.write_text(folder / PAGE, render_leaderboard(found, folder))
        strip = methods_strip(rows, folder)
        if strip is not None:
            storage.write_bytes(folder / STRIP, strip)
        storage.write_text(folder / RESULTS, json.dumps(found, indent=1))
    return found


def _run_all(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Run the cells, those that another benchmark is at, or the training of a killed one, when it has ended.

    Gives their rows, in order.
    """
    rows: dict[int, dict[str, Any]] = {}
    said = False
    while len(rows) < len(cells):
        done = len(rows)
        for number, cell in enumerate(cells, 1):
            if number not in rows:
                with suppress(BlockingIOError), storage.locked(cell.folder) as free:
                    if free:
                        rows[number] = _run(cell, f"{number}/{len(cells)}")
        if len(rows) == done:
            if not said:
                _say(f"another run is at the last {len(cells) - done} of {len(cells)}: waiting for it")
            said = True
            time.sleep(PATIENCE)
    return [rows[number] for number in sorted(rows)]


def _run(cell: Cell, place: str) -> dict[str, Any]:
    """Run a cell, and say how it goes."""
    label = f"{place} {cell.method}, {cell.concept}, seed {cell.seed}"
    row = run_cell(cell, lambda text: _say(f"{label}: {text}"))
    for stage, said in row["failed"].items():
        _say(f"{label}: failed ({stage}): {said}")
    return row


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _prepared(config: BenchmarkConfig, folder: Path) -> Bench:
    """Load the original, and settle how results are evaluated and attacked."""
    _require_page()
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = loading.load(config.model, dtype=getattr(torch, config.dtype)).to(device)
    names = EvaluationConfig.__dataclass_fields__.keys() & BenchmarkConfig.__dataclass_fields__.keys()
    given = {name: getattr(config, name) for name in names}
    evaluation = EvaluationConfig(**given | {"neighbours": _listed(config.neighbours or "") or None})
    full = evaluation.completed(vocabulary=concepts.vocabulary_of(pipe) is not None)
    if config.attack_names and not isinstance(family_of(pipe), StableDiffusion):
        raise ValueError(f"Attacks are for Stable Diffusion 1, 2 and XL; for {config.model} set `attacks` to none.")
    drawing = {
        "count": config.attack_count or (QUICK_PROMPTS if config.quick else 24),
        "num_inference_steps": full.num_inference_steps, "guidance_scale": full.guidance_scale,
        "audit_batch_size": full.batch_size,
    }  # fmt: skip
    attacks = {name: {**drawing, **own} for name, own in config.settings_of_attacks.items()}
    return Bench(
        folder, config.model, pipe, model_fingerprint(pipe), evaluation, attacks, config.recipe,
        config.training_steps, config.save, config.retry,
    )  # fmt: skip


def _require_page() -> None:
    """Say now what the page will need."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("The leaderboard needs jinja2 and matplotlib: run pip install 'sfumato[eval]'.") from error
    kernel_metric()


def _planned(config: BenchmarkConfig, bench: Bench) -> list[Cell]:
    """List the cells; what is wrong with one is said before the first."""
    family = family_of(bench.pipe)
    fitting = [name for name, method in METHODS.items() if isinstance(family, method.family)]
    methods = _listed(config.methods) if config.methods is not None else fitting
    for name in methods:
        if name not in fitting:
            raise ValueError(f"{name} is not for {family.label}: {METHODS[name].wants}.")
    cells = []
    for concept in _listed(config.concepts):
        for method in methods:
            cells += [Cell(bench, method, concept, seed) for seed in config.seed_numbers]
        concepts.resolve(bench.pipe, cells[-1].phrases)
    _check_eyes(config, bench)
    for concept in _listed(config.concepts):
        _check_attacks(config, bench, next(cell.phrases for cell in cells if cell.concept == concept))
    for cell in cells:
        configure(METHODS[cell.method].configs, bench.recipe_of(cell.method, cell.phrases).settings)
    return cells


def _check_eyes(config: BenchmarkConfig, bench: Bench) -> None:
    """Say now, not after the first run, that what pictures are compared with can't be had."""
    vocabulary, device = concepts.vocabulary_of(bench.pipe), bench.pipe.device
    if config.features not in (None, "none"):
        find_features(str(config.features), None if vocabulary is None else judge_of(vocabulary), device)
    if config.clip is not None:
        clip_scorer(config.clip, device)
    if config.real is not None and not Path(config.real).is_dir():
        raise FileNotFoundError(f"There is no folder {config.real} with real pictures.")


def _check_attacks(config: BenchmarkConfig, bench: Bench, phrases: Sequence[str]) -> None:
    """Say the same of what looks for a concept, and of attacks that don't fit its prompts."""
    eye = None
    if config.detector is None:
        detector_for(bench.pipe, phrases)
    else:
        eye = find_detector(config.detector, phrases, device=bench.pipe.device)
    for name, settings in bench.attacks.items():
        check_attack(bench.pipe, bench.pipe, phrases, name, detector=eye, **settings)


def _results(
    config: BenchmarkConfig, bench: Bench, rows: Sequence[Mapping[str, Any]], command: str | None
) -> dict[str, Any]:
    """All that is known, as JSON can hold it."""
    vocabulary = concepts.vocabulary_of(bench.pipe)
    by_recipe = vocabulary if config.recipe is None and config.training_steps is None else None

    asked = {row["folder"]: _asked(bench.folder / row["examples"]) for row in rows if "examples" in row}

    def grouped(key: str) -> dict[str, Any]:
        values = dict.fromkeys(row[key] for row in rows)
        return {value: standings([row for row in rows if row[key] == value], asked) for value in values}

    return {
        "commands": _commands(bench.folder, command), "settings": asdict(config),
        "seeds": sorted({row["seed"] for row in rows}), "attacks": {n: dict(s) for n, s in bench.attacks.items()},
        "model": {"name": bench.model, "fingerprint": bench.fingerprint},
        "versions": {name: version(name) for name in PACKAGES},
        "methods": standings(rows, asked), "domains": grouped("kind"), "concepts": grouped("concept"),
        "expected": expected(rows, by_recipe), "cells": [dict(row) for row in rows],
    }  # fmt: skip


def _commands(folder: Path, command: str | None) -> list[str]:
    """The commands that made what is in the folder, this one last."""
    try:
        earlier = storage.read_json(folder / RESULTS).get("commands", [])
    except (OSError, ValueError):
        earlier = []
    listed = [one for one in earlier if isinstance(one, str)] if isinstance(earlier, list) else []
    return list(dict.fromkeys([*listed, *([] if command is None else [command])]))


def _asked(folder: Path) -> dict[str, Set[Request]]:
    return asked_of(seen for seen in read_sightings(folder) if seen.model == "result")
