"""Evaluate an unlearned model: is the concept gone, is the rest still there, and how sure is that.

Both models draw the same prompts from the same noise, once, for all metrics. What a detector finds in each picture is
kept, so that the rule that tells the concept can be moved afterwards; see `rescore`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from sfumato import concepts, loading, storage
from sfumato.evaluation import comparison
from sfumato.evaluation.detectors import Detector, Rule, detector_for, find_detector, judge_of
from sfumato.evaluation.fingerprints import model_fingerprint
from sfumato.evaluation.pictures import draw_pictures
from sfumato.evaluation.scores import FINDINGS_FILE, Sighting, read_sightings, tally, write_sightings
from sfumato.evaluation.sheet import free_sheet, vocabulary_sheet
from sfumato.families import family_of
from sfumato.memory import peak_memory_mb, reset_peak_memory
from sfumato.settings import check_device, check_seed, check_types
from sfumato.trainer import process_group

__all__ = ["Evaluation", "EvaluationConfig", "evaluate", "release_bytes", "rescore"]

RESULT_FILE, PICTURES = "evaluation.json", "pictures"
OWN_FILES = frozenset({FINDINGS_FILE, PICTURES})
"""What an evaluation that was cut short leaves in its output folder."""
NOT_RELEASED = frozenset({"logs", "checkpoints", "examples", "history.json", "manifest.json"})


@dataclass
class EvaluationConfig:
    """How to evaluate.

    Attributes:
        cache: A folder of pictures that evaluations share; the output's own by default.
        detector: What tells the concept: clip, clip:MODEL, classifier:MODEL, nudenet, nudenet:CLASS,CLASS or
            MODULE:FUNCTION; by default the model's judge if it has one, else clip.
        threshold: Least score of a finding; the detector's own by default.
        top: Highest rank of a finding; the detector's own by default.
        features: In what distances are measured: judge, clip:MODEL, dinov2:MODEL, inception, MODULE:FUNCTION or none;
            by default the judge's if there is one, else clip.
        clip: A CLIP to score with how well pictures fit their prompts; none by default.
        real: A folder of real pictures of what is retained; the shipped renders for the embedded model.
        neighbours: Words close to the concept that must stay; with a vocabulary the other words of its domain.
        retain: Prompts that must stay; common scenes by default, with a vocabulary every other combination.
        forget_repeats: Pictures for each prompt of the concept.
        retain_repeats: Pictures for each other prompt; by default 1 with a vocabulary, else 5.
        num_inference_steps: Sampler steps; by default 20 with a vocabulary, else 50.
        guidance_scale: Classifier-free guidance; by default 3 with a vocabulary, else 7.5.
        batch_size: Pictures at a time; by default 32 with a vocabulary, else 4.
        resamples: For the intervals of distances.
        seed: Seeds pictures and resamples.
        quick: One picture a prompt, half the steps and a quarter of the resamples, for a first look.
        device: Where to run; an accelerator if there is one.
        dtype: What models are loaded in.
    """

    cache: str | None = None
    detector: str | None = None
    threshold: float | None = None
    top: int | None = None
    features: str | None = None
    clip: str | None = None
    real: str | None = None
    neighbours: list[str] | None = field(default=None, metadata={"nargs": "+"})
    retain: list[str] | None = field(default=None, metadata={"nargs": "+"})
    forget_repeats: int = 3
    retain_repeats: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int | None = None
    resamples: int = 200
    seed: int = 0
    quick: bool = False
    device: str | None = None
    dtype: str = field(default="float32", metadata={"choices": ["float32", "bfloat16", "float16"]})

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_types(self)
        check_seed(self.seed)
        check_device(self.device)
        lowest = {"forget_repeats": 1, "retain_repeats": 1, "num_inference_steps": 1, "batch_size": 1, "resamples": 2}
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")

    def completed(self, *, vocabulary: bool) -> EvaluationConfig:
        """Fill in the defaults that depend on the model, and what `quick` means; ValueError if one does not fit it."""
        for name in ("neighbours", "retain"):
            if vocabulary and getattr(self, name):
                raise ValueError(f"`{name}` is for other models: with a vocabulary every other word is looked at.")
        if self.real is not None and self.features == "none":
            raise ValueError("`real` is what distances are measured to, and `features` is none: drop one of them.")
        usual = {"retain_repeats": 1, "num_inference_steps": 20, "guidance_scale": 3.0, "batch_size": 32}
        large = {"retain_repeats": 5, "num_inference_steps": 50, "guidance_scale": 7.5, "batch_size": 4}
        given = {name: getattr(self, name) for name in usual}
        chosen = usual if vocabulary else large
        filled: dict[str, Any] = {n: v if given[n] is None else given[n] for n, v in chosen.items()}
        if self.quick:
            steps = max(1, filled["num_inference_steps"] // 2)
            filled |= {"num_inference_steps": steps, "retain_repeats": 1, "forget_repeats": 1}
            filled["resamples"] = max(2, self.resamples // 4)
        return replace(self, **filled)


@dataclass(frozen=True)
class Evaluation:
    """What was found; all plain values.

    Attributes:
        concept: What was forgotten.
        models: ``result`` and ``original``: name, kind, fingerprint and, of a folder, bytes.
        settings: How pictures were drawn and figures made.
        detector: Its facts, and the rule that tells the concept.
        scores: ``result`` and ``original``: UA, IRA, CRA and neighbours; see `sfumato.evaluation.scores.tally`.
        distances: Between retained pictures of ``result``, ``original`` and ``real``; see
            `sfumato.evaluation.comparison`.
        costs: Seconds by stage and peak memory.
        versions: Of the packages.
        result_fingerprint: What the result's manifest says, whatever format was loaded; None if it has no manifest.
        command: The command line that does the same; None if it was a call.
    """

    concept: dict[str, Any]
    models: dict[str, Any]
    settings: dict[str, Any]
    detector: dict[str, Any]
    scores: dict[str, Any]
    distances: dict[str, Any]
    costs: dict[str, Any]
    versions: dict[str, str]
    result_fingerprint: str | None = None
    command: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return asdict(self)


def evaluate(
    result: DiffusionPipeline | str | Path,
    original: DiffusionPipeline | str | Path | None = None,
    *,
    forget: str | Sequence[str],
    output_dir: str | Path | None = None,
    resume: bool = False,
    command: str | None = None,
    **settings: Any,
) -> Evaluation:
    """Evaluate a model that was made to forget a concept, beside the original.

    Args:
        result: The unlearned model: a pipeline, or what `sfumato.loading.load_result` takes.
        original: The model before; None takes the one that the result's manifest names, if it does.
        forget: What was forgotten, a phrase or several.
        output_dir: Where ``evaluation.json`` and ``findings.jsonl`` go, which must not hold another evaluation; None
            writes nothing.
        resume: Continue an evaluation that was cut short.
        command: The command line that does the same, for the result's card.
        **settings: Of `EvaluationConfig`.

    Returns:
        The evaluation.

    Raises:
        FileExistsError: If the output folder holds something else, or another evaluation.
        ValueError: If a setting is impossible, or a phrase is unknown to the model.
        OSError: If weights or pictures can't be had.
        ImportError: If a package is not installed.
        RuntimeError: If a model's pictures are not finite.
    """
    config, folder = EvaluationConfig(**settings), None if output_dir is None else Path(output_dir)
    if folder is not None:
        _check_output(folder, resume)
    group = process_group()
    if group is not None:
        group.wait_for_everyone()  # until all have found the folder free
    first = group is None or group.is_main_process
    claim = storage.claimed(folder, resume=True, own=OWN_FILES) if first else contextlib.nullcontext()
    with claim:
        found, sightings = _evaluate(result, original, forget, folder, config, group, shown=first)
        found = replace(found, command=command)
        if folder is not None and first:
            write_sightings(folder, sightings)
            storage.write_text(folder / RESULT_FILE, json.dumps(found.as_dict(), indent=1))  # says that all is there
    return found


def rescore(folder: str | Path, rule: Rule) -> Evaluation:
    """Count once more what the pictures of an evaluation show, with another rule; nothing is drawn.

    Args:
        folder: The evaluation's output folder, which is left as it is.
        rule: Tells the concept.

    Returns:
        The evaluation with the rule's scores.

    Raises:
        FileNotFoundError: If the folder holds no finished evaluation.
        ValueError: If it is damaged.
    """
    path = Path(folder) / RESULT_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {RESULT_FILE}: name the output folder of a finished evaluation.")
    stored = storage.read_json(path)
    try:
        before = Evaluation(**{name: stored[name] for name in Evaluation.__dataclass_fields__})
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it has no {error}; evaluate again.") from error
    scores = _scores(read_sightings(folder), rule, before.concept["groups"])
    return replace(before, scores=scores, detector={**before.detector, "rule": rule.as_dict()})


def release_bytes(folder: Path) -> int:
    """Add up the files of a result, or of a model's folder, that a release hands on: no logs, checkpoints or notes."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files if file.relative_to(folder).parts[0] not in NOT_RELEASED)


def _check_output(folder: Path, resume: bool) -> None:
    if (folder / RESULT_FILE).exists():
        raise FileExistsError(f"{folder} already holds an evaluation. Choose another output folder or move it away.")
    storage.check_output_dir(folder, resume=resume, own=OWN_FILES)


def _evaluate(
    result: DiffusionPipeline | str | Path, original: DiffusionPipeline | str | Path | None,
    forget: str | Sequence[str], folder: Path | None, config: EvaluationConfig, group: Any, *, shown: bool,
) -> tuple[Evaluation, list[Sighting]]:  # fmt: skip
    began, seconds = time.perf_counter(), {}
    models = _load(result, original, config, group)
    device = family_of(models["result"]).device
    reset_peak_memory(device)
    reference = models.get("original", models["result"])
    vocabulary = concepts.vocabulary_of(reference)
    concept = concepts.resolve(reference, forget, retain=config.retain)
    config = config.completed(vocabulary=vocabulary is not None)
    detector, rule, sheet, groups = _plan(reference, vocabulary, concept, config)
    judge = None if vocabulary is None else judge_of(vocabulary)
    compared = comparison.prepare(reference, vocabulary, judge, concept.phrases, sheet, config)
    given = {"result": result, "original": original}
    facts = {name: _facts(pipe, given[name]) for name, pipe in models.items()}
    pictures, sightings = {}, []
    for name, pipe in models.items():
        started = time.perf_counter()
        pictures[name] = draw_pictures(
            pipe, [seen.request for seen in sheet], num_inference_steps=config.num_inference_steps or 1,
            guidance_scale=config.guidance_scale or 0.0, batch_size=config.batch_size or 1,
            cache=config.cache or (None if folder is None else folder / PICTURES),
            description=f"draw the {name}" if shown else None,
        )  # fmt: skip
        seconds[f"draw {name}"] = time.perf_counter() - started
        findings = detector(pictures[name])
        sightings += [replace(s, model=name, findings=f) for s, f in zip(sheet, findings, strict=True)]
    started = time.perf_counter()
    distances = comparison.compare(compared, pictures, sheet, config)
    seconds |= {"distances": time.perf_counter() - started, "total": time.perf_counter() - began}
    return Evaluation(
        concept={"name": concept.name, "phrases": list(concept.phrases), "groups": groups},
        models=facts,
        settings={**asdict(config), "scheduler": {n: type(p.scheduler).__name__ for n, p in models.items()}},
        detector={**detector.facts, "rule": rule.as_dict()},
        scores=_scores(sightings, rule, groups),
        distances=distances,
        costs={"seconds": {n: round(s, 2) for n, s in seconds.items()}, "peak_memory_mb": peak_memory_mb(device)},
        versions={name: version(name) for name in ("sfumato", "torch", "diffusers", "transformers")},
        result_fingerprint=_stated(result).get("result_fingerprint"),
    ), sightings


def _load(
    result: DiffusionPipeline | str | Path, original: DiffusionPipeline | str | Path | None, config: EvaluationConfig,
    group: Any,
) -> dict[str, DiffusionPipeline]:  # fmt: skip
    """The models, on the device: the result, and the original if there is one."""
    options = {"dtype": getattr(torch, config.dtype)}
    if original is None and not isinstance(result, DiffusionPipeline):
        original = named_original(result)
    models = {}
    if isinstance(result, DiffusionPipeline):
        models["result"] = result
    else:
        named = original if isinstance(original, str | Path) else None
        models["result"] = loading.load_result(result, named, **options)
    if original is not None:
        models["original"] = original if isinstance(original, DiffusionPipeline) else loading.load(original, **options)
    device = config.device or (group.device if group is not None else None)
    for pipe in models.values():
        pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return models


def _stated(result: DiffusionPipeline | str | Path) -> dict[str, Any]:
    """The result's manifest; empty if there is none."""
    return {} if isinstance(result, DiffusionPipeline) else loading.manifest_of(result)


def named_original(folder: str | Path) -> str | None:
    """The original that a manifest names, unless by the name of a folder that may be anywhere."""
    name = loading.manifest_of(folder).get("model")
    return name if isinstance(name, str) and (name in loading.EMBEDDED or "/" in name) else None


def _plan(
    pipe: DiffusionPipeline, vocabulary: concepts.Vocabulary | None, concept: concepts.Concept,
    config: EvaluationConfig,
) -> tuple[Detector, Rule, list[Sighting], list[str]]:  # fmt: skip
    """The detector, its rule, the pictures to draw, and the groups of the concept's words."""
    repeats = {"forget_repeats": config.forget_repeats, "retain_repeats": config.retain_repeats or 1}
    options: dict[str, Any] = {"threshold": config.threshold, "top": config.top, "device": pipe.device}
    if vocabulary is not None:
        sheet = vocabulary_sheet(vocabulary, concept.phrases, seed=config.seed, **repeats)
        groups = list(dict.fromkeys(domain for phrase in concept.phrases for domain in vocabulary.parse(phrase)))
        if config.detector is not None:
            return *find_detector(config.detector, concept.phrases, **options), sheet, groups
        detector, rule = detector_for(pipe, concept.phrases)
        moved = {name: options[name] for name in ("threshold", "top") if options[name] is not None}
        return detector, replace(rule, **moved), sheet, groups
    name, words = config.detector or "clip", config.neighbours or []
    group = {"clip": "phrase", "classifier": "class"}.get(name.partition(":")[0])
    phrases = [*concept.phrases, *words] if group else concept.phrases
    detector, rule = find_detector(name, phrases, **options)
    if group:
        rule = replace(rule, wanted=tuple((phrase,) for phrase in concept.phrases))
    prompts = {word: concepts.resolve(pipe, word).asked[0] for word in words}
    sheet = free_sheet(concept, prompts, group, seed=config.seed, **repeats)
    return detector, rule, sheet, [group] if group else []


def _scores(sightings: Sequence[Sighting], rule: Rule, groups: Sequence[str]) -> dict[str, Any]:
    names = dict.fromkeys(seen.model for seen in sightings)
    return {name: tally([seen for seen in sightings if seen.model == name], rule, groups) for name in names}


def _facts(pipe: DiffusionPipeline, given: DiffusionPipeline | str | Path | None) -> dict[str, Any]:
    folder = None if given is None or isinstance(given, DiffusionPipeline) else Path(given)
    return {
        "name": family_of(pipe).origin if folder is None else str(given),
        "pipeline": type(pipe).__name__,
        "fingerprint": model_fingerprint(pipe),
        "release_bytes": None if folder is None else release_bytes(folder) or None,
    }
