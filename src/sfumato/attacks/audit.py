"""An audit: a list of prompts against an unlearned model, with one attack, a detector and a count of what came back.

Before the attack each prompt is drawn as it is (pre-ASR); those that show the concept then count, and are not
attacked. The others are attacked in batches, whose candidates are drawn from the prompt's own noise and judged, until
one shows the concept or the attack is at its end. The attack success rate, ASR, is the share of all prompts that
showed the concept before or after, as in UnlearnDiffAtk's leaderboard (Zhang et al., arXiv 2310.11868).

Attacks are audits of models whose weights one has. What is drawn is looked at and forgotten, unless it is asked for.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline

from sfumato import loading, storage
from sfumato.attacks.attack import Answer, Batch, Memory, Round, Setting
from sfumato.attacks.concept_inversion import WORD_FILE
from sfumato.attacks.methods import AttackMethod, attack_named
from sfumato.attacks.prompts import AuditPrompt, read_pairs, refuse_minors, warn_of_cuts
from sfumato.attacks.results import RESULT_FILE, ROWS_FILE, Audit, shares_of
from sfumato.concepts import Concept, resolve, vocabulary_of
from sfumato.evaluation.detectors import (
    ClipDetector,
    Detector,
    Finding,
    Rule,
    detector_for,
    find_detector,
    function_detector,
)
from sfumato.evaluation.features import find_features
from sfumato.evaluation.fingerprints import scheduler_facts
from sfumato.evaluation.pictures import model_fingerprint
from sfumato.families import StableDiffusion, family_of
from sfumato.progress import Track
from sfumato.randomness import generator_for
from sfumato.settings import check_ranges, check_seed, check_types
from sfumato.trainer import process_group
from sfumato.unlearning.embedding_attack import frozen

__all__ = ["RESULT_FILE", "Audit", "AuditConfig", "attack", "check_attack"]

logger = logging.getLogger(__name__)

PICTURE_STREAM = 751
AUDIT_FILE = "audit.json"
OWN_FILES = frozenset({AUDIT_FILE, ROWS_FILE, WORD_FILE, "batches", "pictures"})
"""What an unfinished audit leaves in its folder."""


@dataclass
class AuditConfig:
    """How prompts are drawn and attacked, whatever the attack.

    Attributes:
        count: How many of the concept's own prompts to attack, evenly spread; None takes all.
        num_inference_steps: Sampler steps of each picture; by default 20 with a vocabulary, else 50.
        guidance_scale: Classifier-free guidance of each picture, unless its prompt says another; by default 3 with a
            vocabulary, else 7.5.
        audit_batch_size: Prompts attacked side by side; by default 16 with a vocabulary, else 4.
        seed: Seeds pictures and attack.
        keep_pictures: Save the picture of each prompt that showed the concept.
    """

    count: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    audit_batch_size: int | None = None
    seed: int = 0
    keep_pictures: bool = False

    def __post_init__(self) -> None:
        """Check the types and ranges."""
        check_types(self)
        check_seed(self.seed)
        check_ranges(self, {"count": 1, "num_inference_steps": 1, "guidance_scale": 1, "audit_batch_size": 1})

    def completed(self, *, vocabulary: bool) -> AuditConfig:
        """Fill in the defaults that depend on whether the model has a vocabulary."""
        steps, scale, size = (20, 3.0, 16) if vocabulary else (50, 7.5, 4)
        return replace(
            self, num_inference_steps=self.num_inference_steps or steps, guidance_scale=self.guidance_scale or scale,
            audit_batch_size=self.audit_batch_size or size,
        )  # fmt: skip


def attack(
    unlearned: DiffusionPipeline | str | Path,
    original: DiffusionPipeline | str | Path,
    forget: str | Sequence[str],
    method: str = "unlearndiffatk",
    *,
    prompts: Sequence[str | AuditPrompt] | None = None,
    detector: tuple[Detector, Rule] | str | Callable[[torch.Tensor], Any] | None = None,
    features: Any = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    command: str | None = None,
    result_fingerprint: str | None = None,
    **settings: Any,
) -> Audit:
    """Try to bring a forgotten concept back, and count how often that works.

    Several processes, as ``accelerate launch`` starts them, share the batches; a prompt's result does not depend on
    how many there are.

    Args:
        unlearned: The model to audit, which is not changed: a pipeline, or what `sfumato.loading.load_result` takes.
        original: The model as it was: a pipeline, or what `sfumato.load` takes.
        forget: What was forgotten.
        method: One of `sfumato.attacks.methods.ATTACKS`.
        prompts: What to attack; by default the concept's own prompts, as many as `count` says.
        detector: What looks at the pictures, and when that counts; or its name, see
            `sfumato.evaluation.detectors.find_detector`; or a function, see `FunctionDetector` there. By default the
            model's judge, or CLIP.
        features: Embeds pictures ``(N, 3, H, W)`` as ``(N, F)``, for attacks that choose by likeness, or the name of
            what does, see `sfumato.evaluation.features`; by default the detector's own, if it is a judge or CLIP.
        output_dir: Where attack.json and prompts.jsonl go, and what a run that is cut short has finished.
        resume: Continue such a run.
        command: The command line that does the same, for the result's card.
        result_fingerprint: What the manifest of the unlearned model calls it, for the same; of a folder it is known.
        **settings: Any field of the attack's config or of `AuditConfig`.

    Returns:
        The audit.

    Raises:
        ValueError: If the attack, the concept or a setting is unknown, there is no prompt, or `count` with prompts of
            one's own, a prompt has no room for it, likeness can't be measured where the attack needs that, the prompts
            would have minors drawn in a sexual way, or the run to resume is another.
        FileExistsError: If `output_dir` holds another audit, or one is running there.
        RuntimeError: If a model's pictures are not finite.
    """
    if not isinstance(unlearned, DiffusionPipeline):
        result_fingerprint = result_fingerprint or loading.manifest_of(unlearned).get("result_fingerprint")
    unlearned, original = _loaded(unlearned, original)
    began = time.perf_counter()
    plan = _plan(unlearned, original, forget, method, prompts, detector, features, output_dir, settings)
    chosen, config, audit, setting = plan.chosen, plan.config, plan.audit, plan.setting
    folder, identity = setting.folder, plan.identity
    group = process_group()
    first = group is None or group.is_main_process
    if folder is not None and first:
        _refuse_others(folder)
    with (
        storage.claimed(folder if first else None, resume=True, own=OWN_FILES),
        frozen(*setting.victim.parts.values()),
    ):
        if folder is not None and first:
            _prepare(folder, identity, resume=resume)
        if group is not None:
            group.wait_for_everyone()
        chosen.prepare(setting, config)
        runner = _Runner(
            setting, plan.prompts, plan.eye, plan.rule, audit, folder, lambda batch: chosen.run(batch, config)
        )
        rows = runner.run(method, group)
        found = _summed(identity, rows, runner.seconds or time.perf_counter() - began)
        if folder is not None and first:
            _write(folder, found, {"result_fingerprint": result_fingerprint, "command": command})
    return found


def _loaded(
    unlearned: DiffusionPipeline | str | Path, original: DiffusionPipeline | str | Path
) -> tuple[DiffusionPipeline, DiffusionPipeline]:
    """Both models; what is not a pipeline yet is loaded, onto an accelerator if there is one."""
    group = process_group()
    device = group.device if group is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(unlearned, DiffusionPipeline):
        named = None if isinstance(original, DiffusionPipeline) else original
        unlearned = loading.load_result(unlearned, named).to(device)
    if not isinstance(original, DiffusionPipeline):
        original = loading.load(original).to(device)
    return unlearned, original


def check_attack(
    unlearned: DiffusionPipeline, original: DiffusionPipeline, forget: str | Sequence[str], method: str, *,
    prompts: Sequence[str | AuditPrompt] | None = None, detector: Any = None, features: Any = None, **settings: Any,
) -> None:  # fmt: skip
    """Find what is wrong with a call of `attack`, whose arguments these are, without attacking.

    Raises:
        ValueError: As `attack` does.
    """
    _plan(unlearned, original, forget, method, prompts, detector, features, None, settings)


@dataclass(frozen=True)
class _Plan:
    """What is to be done, once all of it is known to fit together."""

    chosen: AttackMethod
    config: Any
    audit: AuditConfig
    setting: Setting
    prompts: Sequence[AuditPrompt]
    eye: Detector
    rule: Rule
    identity: Mapping[str, Any]


def _plan(
    unlearned: DiffusionPipeline, original: DiffusionPipeline, forget: str | Sequence[str], method: str,
    prompts: Sequence[str | AuditPrompt] | None, detector: Any, features: Any, output_dir: str | Path | None,
    settings: Mapping[str, Any],
) -> _Plan:  # fmt: skip
    """Check the arguments of `attack`, and settle what follows from them."""
    chosen = attack_named(method)
    config, audit = _configs(chosen.config, settings)
    victim, source = family_of(unlearned), family_of(original)
    if not isinstance(victim, StableDiffusion) or not isinstance(source, StableDiffusion):
        raise ValueError(
            f"Attacks put tokens before CLIP, as Stable Diffusion 1, 2 and XL have it; not {victim.label}."
        )
    concept, audit = resolve(original, forget), audit.completed(vocabulary=vocabulary_of(original) is not None)
    asked = _asked(prompts, concept, audit)
    eye, rule = _eye(detector, original, concept)
    pairs = read_pairs(config.pairs) if getattr(config, "pairs", None) is not None else []
    texts = [*(one.text for one in asked), *(text for pair in pairs for text in pair)]
    refuse_minors(texts, [*concept.phrases, str(eye.facts.get("detector"))])
    warn_of_cuts(victim, [one.text for one in asked])
    alike, features_name = _features_of(eye, features, victim.device)
    drawn = _drawn(unlearned, original, features_name)
    fingerprints = {"unlearned": model_fingerprint(unlearned), "original": model_fingerprint(original)}
    setting = Setting(
        victim, source, concept, audit.seed, audit.num_inference_steps or 1, audit.guidance_scale or 1.0, alike,
        None if output_dir is None else Path(output_dir), {"fingerprints": fingerprints, "drawn": drawn},
    )  # fmt: skip
    chosen.check(setting, *victim.tokenize([one.text for one in asked]), config)
    identity = {
        "attack": method, "concept": {"name": concept.name, "phrases": list(concept.phrases)},
        "settings": {**asdict(config), **asdict(audit)}, "fingerprints": fingerprints, "drawn": drawn,
        "prompts": [asdict(one) for one in asked], "pairs": pairs, "detector": eye.facts, "rule": rule.as_dict(),
        "versions": {name: version(name) for name in ("sfumato", "torch", "diffusers", "transformers")},
    }  # fmt: skip
    return _Plan(chosen, config, audit, setting, asked, eye, rule, json.loads(json.dumps(identity, default=str)))


def _configs(kind: type[Any], settings: Mapping[str, Any]) -> tuple[Any, AuditConfig]:
    """Share settings between the attack and the audit; an unknown one is refused."""
    known: list[dict[str, Any]] = []
    for cls in (kind, AuditConfig):
        known.append({name: value for name, value in settings.items() if name in cls.__dataclass_fields__})
    unknown = [name for name in settings if not any(name in some for some in known)]
    if unknown:
        names = sorted({*kind.__dataclass_fields__, *AuditConfig.__dataclass_fields__})
        raise ValueError(f"There is no setting {unknown[0]!r}; there are {', '.join(names)}.")
    return kind(**known[0]), AuditConfig(**known[1])


def _asked(prompts: Sequence[str | AuditPrompt] | None, concept: Concept, audit: AuditConfig) -> list[AuditPrompt]:
    """The prompts to attack: the user's, or the concept's own."""
    if isinstance(prompts, str | bytes):
        raise ValueError("`prompts` is one text: give a list of prompts.")
    if prompts is not None and not prompts:
        raise ValueError("`prompts` is empty: name at least one, or leave it out for the concept's own.")
    if prompts is not None and audit.count is not None:
        raise ValueError("`count` is of the concept's own prompts: of a list of yours all are attacked; leave it out.")
    given = _spread(concept.prompts, audit) if prompts is None else prompts
    return [one if isinstance(one, AuditPrompt) else AuditPrompt(one) for one in given]


def _eye(detector: Any, original: DiffusionPipeline, concept: Concept) -> tuple[Detector, Rule]:
    """What looks at the pictures, and when that counts."""
    if detector is None:
        return detector_for(original, concept.phrases)
    if isinstance(detector, str):
        return find_detector(detector, concept.phrases, device=original.device)
    if callable(detector):
        return function_detector(detector, concept.phrases)
    eye, rule = detector
    return eye, rule


def _spread(prompts: Sequence[str], audit: AuditConfig) -> list[str]:
    count = min(audit.count or len(prompts), len(prompts))
    return [prompts[k * len(prompts) // count] for k in range(count)]


def _features_of(eye: Detector, features: Any, device: torch.device) -> tuple[Any, str | None]:
    """What likeness is measured in, and its name."""
    judge = getattr(eye, "judge", None)
    if isinstance(features, str):
        return find_features(features, judge, device), features
    if features is not None:
        return features, getattr(features, "__qualname__", type(features).__name__)
    if judge is not None:
        return torch.no_grad()(judge.features), "judge"
    if isinstance(eye, ClipDetector):
        return eye.features, f"clip:{eye.facts['model']}"
    return None, None


def _drawn(unlearned: DiffusionPipeline, original: DiffusionPipeline, features: str | None) -> dict[str, Any]:
    """What pictures depend on besides the models and the settings."""
    victim = family_of(unlearned)
    return {
        "schedulers": {"unlearned": scheduler_facts(unlearned), "original": scheduler_facts(original)},
        "features": features, "device": victim.device.type, "dtype": str(victim.dtype).removeprefix("torch."),
    }  # fmt: skip


def _refuse_others(folder: Path) -> None:
    """Refuse a folder that holds anything but what an audit that was cut short has left there."""
    if (folder / RESULT_FILE).exists():
        raise FileExistsError(f"{folder} already holds an audit; choose another folder.")
    if folder.is_dir() and not (folder / AUDIT_FILE).exists():
        rest = [file.name for file in folder.iterdir() if file.name != storage.LOCK_FILE]
        if not all(name.endswith(".partial") for name in rest):
            raise FileExistsError(f"{folder} holds other files; choose an empty folder.")


def _prepare(folder: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
    """Say in a folder that is claimed what the audit is, or find that an earlier start of the same one did."""
    path = folder / AUDIT_FILE
    if not path.exists():
        storage.write_text(path, json.dumps(identity, indent=1))
        return
    if not resume:
        raise FileExistsError(f"{folder} holds an audit that was cut short; go on with --resume, or choose another.")
    earlier = storage.read_json(path)
    differing = [name for name in identity if earlier.get(name) != identity[name] and name != "versions"]
    if differing:
        raise ValueError(f"{folder} holds another audit: its {', '.join(differing)} differ. Choose another folder.")
    if earlier.get("versions") != identity["versions"]:
        logger.warning("The audit in %s was begun with other versions of packages: %s.", folder, earlier["versions"])


@dataclass
class _Runner:
    """Goes through the batches of an audit."""

    setting: Setting
    prompts: Sequence[AuditPrompt]
    eye: Detector
    rule: Rule
    audit: AuditConfig
    folder: Path | None
    attack: Any
    seconds: float = field(default=0.0)
    _track: Any = field(init=False, default=None)

    def run(self, label: str, group: Any) -> list[dict[str, Any]]:
        """Attack all prompts; gives their rows, on every process."""
        size, rank, processes = self.audit.audit_batch_size or 1, 0, 1
        if group is not None:
            rank, processes = group.process_index, group.num_processes
        starts = range(0, len(self.prompts), size)
        done: dict[int, list[dict[str, Any]]] = {}
        self._track = Track(starts[rank::processes], label, shown=rank == 0)
        for start in self._track:
            numbers = tuple(range(start, min(start + size, len(self.prompts))))
            done[start] = self._stored(start) or self._attacked(numbers)
        if group is not None:
            done = dict(gather_object(list(done.items())))
        rows = [row for start in starts for row in done[start]]
        self.seconds = sum(row["seconds"] for row in rows)
        return rows

    def _file(self, start: int) -> Path | None:
        return None if self.folder is None else self.folder / "batches" / f"{start:06d}.json"

    def _stored(self, start: int) -> list[dict[str, Any]] | None:
        file = self._file(start)
        try:
            return None if file is None or not file.exists() else storage.read_json(file)["rows"]
        except (ValueError, KeyError):  # half-written by a machine that went down
            return None

    @torch.no_grad()
    def _attacked(self, numbers: tuple[int, ...]) -> list[dict[str, Any]]:
        began, texts, file = time.perf_counter(), tuple(self.prompts[k].text for k in numbers), self._file(numbers[0])
        rows: list[dict[str, Any]] = []
        left: list[int] = []
        earlier = 0.0

        def beside() -> dict[str, Any]:
            return {"rows": rows, "left": left, "seconds": earlier + time.perf_counter() - began}

        memory = Memory(file and file.with_suffix(".safetensors"), {"numbers": list(numbers)}, beside)
        targets = self._draw(self.setting.source, numbers, Round(tuple(range(len(numbers))), texts))
        stored = memory.kept_beside()
        if stored is None:
            rows += self._unattacked(numbers, texts, targets)
            left += [k for k, row in enumerate(rows) if not row["before"]]
        else:  # the run that kept it was killed
            rows, left, earlier = stored["rows"], stored["left"], stored["seconds"]
        if left:
            own = tuple(numbers[k] for k in left), tuple(texts[k] for k in left), targets[left]
            self._converse(Batch(self.setting, *own, memory), [rows[k] for k in left])
        for row in rows:
            row["seconds"] = (earlier + time.perf_counter() - began) / len(rows)
        if file is not None:
            storage.write_text(file, json.dumps({"rows": rows}))
            memory.forget()
        return rows

    def _unattacked(
        self, numbers: tuple[int, ...], texts: tuple[str, ...], targets: torch.Tensor
    ) -> list[dict[str, Any]]:
        """The rows of prompts as they are."""
        plain = self._draw(self.setting.victim, numbers, Round(tuple(range(len(numbers))), texts))
        there, before = self.eye(targets), self.eye(plain)
        rows: list[dict[str, Any]] = [
            {
                "number": number, **asdict(self.prompts[number]), "original": self.rule(there[k]),
                "before": self.rule(before[k]), "after": self.rule(before[k]), "candidate": None, "iterations": 0,
                "findings_original": _plain(there[k]), "findings_before": _plain(before[k]), "candidates": [],
            }
            for k, number in enumerate(numbers)
        ]  # fmt: skip
        self._keep_pictures(rows, plain)
        return rows

    def _converse(self, batch: Batch, rows: Sequence[dict[str, Any]]) -> None:
        """Let the attack make its rounds, and note in the rows what comes of them."""
        talk = self.attack(batch)
        try:
            asked = next(talk)
            while True:
                drawn = self._draw(self.setting.victim, batch.numbers, asked)
                found = self.eye(drawn)
                shown = tuple(self.rule(some) for some in found)
                if asked.final:
                    for place, k in enumerate(asked.rows):
                        spelled = None if asked.prompts is None else asked.prompts[place]
                        rows[k].update(after=shown[place], iterations=asked.iterations, candidate=spelled)
                        rows[k]["candidates"].append(
                            {"prompt": spelled, "iterations": asked.iterations, "findings": _plain(found[place])}
                        )
                    self._keep_pictures([rows[k] for k in asked.rows], drawn)
                succeeded = sum(row["after"] for row in rows)
                self._track.say(iterations=str(asked.iterations), succeeded=f"{succeeded}/{len(rows)}")
                asked = talk.send(Answer(shown, drawn))
        except StopIteration:
            return

    def _keep_pictures(self, rows: Sequence[Mapping[str, Any]], pictures: torch.Tensor) -> None:
        """Save those that show the concept, if that is asked for."""
        for row, picture in zip(rows, pictures, strict=True):
            if self.audit.keep_pictures and row["after"] and self.folder is not None:
                _save_picture(self.folder / "pictures" / f"{row['number']:06d}.png", picture)

    def _draw(self, family: StableDiffusion, numbers: Sequence[int], asked: Round) -> torch.Tensor:
        """Draw candidates, each from its prompt's own noise: 8-bit pictures ``(b, 3, H, W)`` in [0, 1]."""
        own = [self.prompts[numbers[k]] for k in asked.rows]
        usual = self.setting.guidance_scale
        scales = [usual if one.guidance_scale is None else one.guidance_scale for one in own]
        drawn: dict[int, torch.Tensor] = {}
        for scale in dict.fromkeys(scales):
            some = [k for k, other in enumerate(scales) if other == scale]
            told = None
            if asked.conditioning is not None:
                told = {name: values[some] for name, values in asked.conditioning.items()}
            texts = [own[k].text if asked.prompts is None else asked.prompts[k] for k in some]
            pictures = family.generate(
                texts, [self._generator(numbers[asked.rows[k]]) for k in some],
                num_inference_steps=self.setting.num_inference_steps, guidance_scale=scale, conditioning=told,
            ).cpu()  # fmt: skip
            drawn.update(zip(some, pictures, strict=True))
        together = torch.stack([drawn[k] for k in range(len(own))])
        if not torch.isfinite(together).all():
            raise RuntimeError(
                "A model draws pictures that are not finite: its weights are broken, or too large for its dtype; load "
                "it in float32. What was finished is kept."
            )
        return (255 * together.clamp(0, 1)).round() / 255

    def _generator(self, number: int) -> torch.Generator:
        seed = self.prompts[number].seed
        if seed is None:
            return generator_for(self.audit.seed, PICTURE_STREAM, number)
        return torch.Generator().manual_seed(seed)


def _plain(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [found.as_dict() for found in findings]


def _save_picture(file: Path, picture: torch.Tensor) -> None:
    from diffusers.utils import pt_to_pil

    file.parent.mkdir(exist_ok=True)
    pt_to_pil(2 * picture[None] - 1)[0].save(file)


def _summed(identity: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], seconds: float) -> Audit:
    named = {name: value for name, value in identity.items() if name in Audit.__dataclass_fields__}
    seed = identity["settings"]["seed"]
    return Audit(**named, seed=seed, **shares_of(rows), rows=tuple(rows), seconds=seconds)


def _write(folder: Path, found: Audit, more: Mapping[str, Any]) -> None:
    """Write the result; what was kept to resume goes."""
    storage.write_text(folder / ROWS_FILE, "".join(json.dumps(row) + "\n" for row in found.rows))
    storage.write_text(folder / RESULT_FILE, json.dumps({**found.as_dict(), **more}, indent=1))
    shutil.rmtree(folder / "batches", ignore_errors=True)
    (folder / AUDIT_FILE).unlink()
    for partial in folder.glob(".*.partial"):  # of a start that was killed while writing
        partial.unlink(missing_ok=True)
