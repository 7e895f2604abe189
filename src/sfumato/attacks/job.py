"""An audit as one job: what ``sfumato attack`` does with its command line, also under ``accelerate launch``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sfumato import loading, terminal
from sfumato.arguments import make_parser
from sfumato.attacks.audit import AuditConfig, attack
from sfumato.attacks.methods import attack_named
from sfumato.attacks.prompts import read_prompts
from sfumato.attacks.results import RESULT_FILE, summary
from sfumato.concepts import resolve
from sfumato.evaluation.detectors import detector_for, find_detector
from sfumato.evaluation.evaluate import named_original
from sfumato.settings import check_device
from sfumato.trainer import process_group

__all__ = ["AttackJob", "main", "make_job_parser"]


@dataclass
class AttackJob:
    """What to audit.

    Attributes:
        model: The unlearned model: a job's output folder, in any format, an embedded model or a Hub id.
        forget: What was forgotten: one phrase or several.
        output: Folder for attack.json and prompts.jsonl; another audit is never overwritten.
        original: The model before; by default the one that the result's manifest names, unless that is a bare name,
            which could be any folder's.
        prompts: A file of prompts, .txt, .csv or .jsonl; by default the concept's own.
        detector: What tells the concept: clip, clip:MODEL, classifier:MODEL, nudenet, nudenet:CLASS,CLASS or
            MODULE:FUNCTION; by default the model's judge if it has one, else clip.
        threshold: Least score of a finding; the detector's own by default.
        top: Highest rank of a finding; the detector's own by default.
        features: What likeness of pictures is measured in, for p4d: clip:MODEL, dinov2:MODEL or MODULE:FUNCTION; by
            default the detector's own, if it is the judge or CLIP.
        resume: Continue an audit that was cut short.
        device: Where to run; an accelerator if there is one.
        dtype: What models are loaded in.
    """

    model: str
    forget: list[str] = field(metadata={"nargs": "+"})
    output: str = field()
    original: str | None = None
    prompts: str | None = None
    detector: str | None = None
    threshold: float | None = None
    top: int | None = None
    features: str | None = None
    resume: bool = False
    device: str | None = None
    dtype: str = field(default="float32", metadata={"choices": ["float32", "bfloat16", "float16"]})

    def __post_init__(self) -> None:
        """Check what can be checked without the models."""
        check_device(self.device)


def make_job_parser(method: str, examples: Sequence[str] = ()) -> Any:
    """Make the parser of an attack's command line; see `sfumato.arguments.make_parser`."""
    chosen = attack_named(method)
    return make_parser(
        AttackJob, chosen.config, AuditConfig, description=chosen.summary, program=f"sfumato attack {method}",
        examples=examples,
    )  # fmt: skip


def main(method: str, arguments: Sequence[str], examples: Sequence[str] = ()) -> terminal.Answer:
    """Run an audit from a command line.

    Args:
        method: The attack.
        arguments: The command line.
        examples: For ``--help``.

    Returns:
        What it found.
    """
    job, config, audit = make_job_parser(method, examples).parse_args_into_dataclasses(list(arguments))
    name = job.original or _original_of(job.model)
    options = {"dtype": getattr(torch, job.dtype)}
    original, group = loading.load(name, **options), process_group()
    unlearned = loading.load_result(job.model, name, **options)
    device = job.device or (group.device if group is not None else "cuda" if torch.cuda.is_available() else "cpu")
    for pipe in (original, unlearned):
        pipe.to(device)
    phrases = resolve(original, job.forget).phrases
    if job.detector is None:
        eye, rule = detector_for(original, phrases)
        moved = {"threshold": job.threshold, "top": job.top}
        detector = eye, replace(rule, **{name: value for name, value in moved.items() if value is not None})
    else:
        detector = find_detector(job.detector, phrases, threshold=job.threshold, top=job.top, device=device)
    program = f"sfumato attack {method}"
    with terminal.resumable(job.output, program, arguments, resume=job.resume):
        found = attack(
            unlearned, original, job.forget, method, detector=detector, output_dir=job.output, resume=job.resume,
            prompts=None if job.prompts is None else read_prompts(job.prompts), features=job.features,
            command=f"{program} {shlex.join(arguments)}",
            result_fingerprint=loading.manifest_of(job.model).get("result_fingerprint"),
            **asdict(config), **asdict(audit),
        )  # fmt: skip
    file, following = Path(job.output) / RESULT_FILE, ""
    if Path(job.model).is_dir():
        words = ["release", job.model, "--output", f"{Path(job.model)}-release", "--attacks", str(file)]
        following = shlex.join(["sfumato", *words])
    return terminal.Answer(
        {"output": str(Path(job.output)), **found.as_dict()}, f"{summary(found)}\n{file}", following
    )


def _original_of(folder: str) -> str:
    """The original that a result's manifest names, where that can be but one model."""
    name = named_original(folder)
    if name is None:
        raise ValueError(f"{folder} does not say of which model it was made: name the model before with --original.")
    return name
