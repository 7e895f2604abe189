"""What an evaluation and attacks found, as rows of the card and as the Hub's ``model-index``."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from sfumato import storage
from sfumato.attacks.methods import ATTACKS
from sfumato.releasing.commands import MACHINE, AuditCommand, audit_command, rescore_command, without_folders

__all__ = [
    "Figure",
    "Finding",
    "Value",
    "attack_figures",
    "eval_results",
    "evaluation_figures",
    "one_line",
    "published",
    "read_attack",
    "read_evaluation",
]

_MEASURES = {"frechet": "Fréchet distance", "kernel": "kernel distance", "authentic": "share of no near-copies"}


@dataclass(frozen=True)
class Value:
    """A number that was measured.

    Attributes:
        value: It.
        low: Lower end of its 95 % interval; None if there is none.
        high: Upper end.
        successes: Of a share, how many.
        total: Of how many.
    """

    value: float
    low: float | None = None
    high: float | None = None
    successes: int | None = None
    total: int | None = None

    @property
    def worded(self) -> str:
        """It and its interval: a share in per cent."""
        share = self.successes is not None
        ends = [self.value, *(end for end in (self.low, self.high) if end is not None)]
        value, *interval = (f"{100 * end:.1f}" if share else f"{end:.3g}" for end in ends)
        return value + (" %" if share else "") + (f" [{', '.join(interval)}]" if len(interval) == 2 else "")

    @property
    def counted(self) -> str:
        """What was counted, worded."""
        return "" if self.successes is None or self.total is None else f"{self.successes} of {self.total}"

    def as_dict(self) -> dict[str, float]:
        """Give what there is of it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Figure:
    """A row of the card.

    Attributes:
        name: What was measured.
        after: Of the result.
        before: Of the original; None where that says nothing.
    """

    name: str
    after: Value
    before: Value | None = None

    @property
    def arguments(self) -> dict[str, float]:
        """All but the name and the result's value, in one mapping."""
        found = self.after.as_dict()
        found.pop("value")
        before = {} if self.before is None else self.before.as_dict()
        return found | {"before" if name == "value" else f"before_{name}": value for name, value in before.items()}


def one_line(text: Any) -> str:
    """A text without line ends and characters that can't be seen, for metadata."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def read_evaluation(path: str | Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Read what ``sfumato evaluate`` wrote; see `_read`."""
    found = _read(path, manifest, "evaluate", {"models": dict, "settings": dict, "detector": dict, "scores": dict,
                                               "distances": dict})  # fmt: skip
    if not isinstance(found["scores"].get("result"), dict):
        raise ValueError(f"{path} is not what `sfumato evaluate` writes: it has no scores of the result.")
    return found


def read_attack(path: str | Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Read what ``sfumato attack`` wrote; see `_read`."""
    found = _read(path, manifest, "attack", {"attack": str, "settings": dict, "detector": dict, "rule": dict,
                                             "asr": dict, "pre_asr": dict, "original": dict})  # fmt: skip
    if found["attack"] not in ATTACKS:
        raise ValueError(f"{path} names an attack {found['attack']!r}; choose from {', '.join(ATTACKS)}.")
    return found


def _read(path: str | Path, manifest: Mapping[str, Any], writer: str, needed: Mapping[str, type]) -> dict[str, Any]:
    """Read what an evaluation or attack wrote.

    Args:
        path: Its JSON file.
        manifest: The run's: both must be of the same result.
        writer: The command that writes such a file.
        needed: What it must hold, besides the concept.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not JSON, not such a file, or of another result.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    found = storage.read_json(path)
    missing = [name for name, kind in {**needed, "concept": dict}.items() if not isinstance(found.get(name), kind)]
    if missing:
        raise ValueError(f"{path} is not what `sfumato {writer}` writes: its {missing[0]!r} is missing or wrong.")
    fingerprint, wanted = found.get("result_fingerprint"), manifest["result_fingerprint"]
    if fingerprint is None:
        raise ValueError(
            f"{path} does not say which result it is of: run `sfumato {writer}` on the run's folder, or give that"
            f" folder to sfumato.{writer} in the place of the model."
        )
    if fingerprint != wanted:
        raise ValueError(f"{path} is of another result (fingerprint {fingerprint}, not {wanted}).")
    phrases = found["concept"].get("phrases")
    if phrases not in ([manifest["forget"]], manifest["concept"].get("phrases")):
        raise ValueError(f"{path} is about {phrases!r}, but the run forgot {manifest['forget']!r}.")
    return found


@dataclass(frozen=True)
class Finding:
    """What an evaluation or attack found, as it is released.

    Attributes:
        file: Its file in the release.
        content: It, without what is a matter of the machine it ran on; its command works in the folder of the
            release, or is None if it was made by a call.
        brought: The options of the command that name what is not part of the release.
    """

    file: str
    content: Mapping[str, Any]
    brought: tuple[str, ...]


def published(found: Mapping[str, Any], file: str, *, model: str, original: str, release: str) -> Finding:
    """Make of what an evaluation or attack found what can be released.

    Args:
        found: It.
        file: Its file in the release.
        model: What the command in the folder of the release audits.
        original: The name of the model before.
        release: That of the release.

    Returns:
        The finding.
    """
    names = {"result": release, "original": original}
    named = original if "scores" not in found or "original" in found["scores"] else None
    output = "audit" if file == "evaluation.json" else file.removesuffix(".json")
    origin = found.get("rescored")
    kept = {name: value for name, value in found.items() if name not in ("command", "rescored")}
    if isinstance(origin, Mapping):
        command = _recounted(origin, model, named, output)
        kept["rescored"] = {name: origin[name] for name in ("rule", "by") if name in origin}
    else:
        command = audit_command(found.get("command"), model=model, original=named, output=output)
    copy = _without_folders(kept)
    if "models" in copy:
        facts = {which: told for which, told in copy["models"].items() if which in names and isinstance(told, dict)}
        copy["models"] = {which: {**told, "name": names[which]} for which, told in facts.items()}
    line, brought = (None, ()) if command is None else command
    return Finding(file, {**copy, "command": line}, brought)


def _recounted(origin: Mapping[str, Any], model: str, original: str | None, output: str) -> AuditCommand | None:
    """The commands that repeat audits and count them again; None if one of them was made by a call."""
    stated = origin.get("commands")
    stated = stated if isinstance(stated, list) else []
    folders = [output if len(stated) == 1 else f"{output}-{number}" for number in range(1, len(stated) + 1)]
    pairs = zip(stated, folders, strict=True)
    again = [audit_command(one, model=model, original=original, output=folder) for one, folder in pairs]
    counting = rescore_command(origin.get("by"), folders, f"{output}-counted.json")
    audits = [one for one in again if one is not None]
    if not audits or len(audits) < len(again) or counting is None:
        return None
    brought = dict.fromkeys(name for one in audits for name in one.brought)
    return AuditCommand("\n".join([*(one.line for one in audits), counting]), tuple(brought))


def _without_folders(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in values.items() if name not in MACHINE}
    return {
        name: _without_folders(value) if isinstance(value, Mapping) else without_folders(name, value)[0]
        for name, value in kept.items()
    }


def evaluation_figures(evaluation: Mapping[str, Any]) -> list[Figure]:
    """Give UA, IRA, CRA, the neighbours and the distances; nothing that is missing or no number."""
    after, before = (_mapping(evaluation["scores"].get(name)) for name in ("result", "original"))
    found = [_figure(name.upper(), after.get(name), before.get(name)) for name in ("ua", "ira", "cra")]
    words, others = _mapping(after.get("neighbours")), _mapping(before.get("neighbours"))
    found += [_figure(f"neighbour: {word}", value, others.get(word)) for word, value in words.items()]
    distances = evaluation["distances"]
    for other, named in (("original", "the original"), ("real", "real pictures")):
        pair, same = _mapping(distances.get(f"result to {other}")), _mapping(distances.get(f"original to {other}"))
        found += [
            _figure(f"{_MEASURES.get(name, name)}, against {named}", value, same.get(name))
            for name, value in pair.items()
        ]
    found += [_figure(f"drift, {kind}", value) for kind, value in _mapping(distances.get("drift")).items()]
    fit = _mapping(distances.get("clip_score"))
    after, before = (_mapping(fit.get(name)) for name in ("result", "original"))
    found += [_figure(f"CLIP score, {kind}", value, before.get(kind)) for kind, value in after.items()]
    return [figure for figure in found if figure is not None]


def attack_figures(attack: Mapping[str, Any]) -> list[Figure]:
    """Give the share of prompts that show the concept as they are (Pre-ASR), and as they are or attacked (ASR)."""
    found = [_figure("Pre-ASR", attack["pre_asr"], attack["original"]), _figure("ASR", attack["asr"])]
    return [figure for figure in found if figure is not None]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _figure(name: str, after: Any, before: Any = None) -> Figure | None:
    value = _value(after)
    return None if value is None else Figure(name, value, _value(before))


def _value(stated: Any) -> Value | None:
    """A number with its interval, as the metrics write it; None if it is none."""
    numbers = {name: value for name, value in _mapping(stated).items() if _number(value)}
    known = {name: numbers[name] for name in ("value", "low", "high", "successes", "total") if name in numbers}
    return Value(**known) if "value" in known else None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def eval_results(
    forget: str, evaluation: Mapping[str, Any] | None, attacks: Sequence[Mapping[str, Any]]
) -> list[EvalResult]:
    """Give all figures in the Hub's form.

    Args:
        forget: The concept.
        evaluation: What the evaluation found.
        attacks: What the attacks found.

    Returns:
        One result a figure.
    """
    concept = one_line(forget)
    found = []
    if evaluation is not None:
        name = f"prompts with and without {concept}"
        found = [_eval_result("sfumato-evaluation", name, None, figure) for figure in evaluation_figures(evaluation)]
    for number, attack in enumerate(attacks, 1):
        kind = one_line(attack["attack"])
        name = f"{kind} attack on {concept}"
        config = f"{number}-{_slug(kind)}"  # results of one data set and config are taken for one
        found += [_eval_result("sfumato-attack", name, config, figure) for figure in attack_figures(attack)]
    return found


def _eval_result(kind: str, name: str, config: str | None, figure: Figure) -> EvalResult:
    return EvalResult(
        task_type="text-to-image", task_name="Concept unlearning", dataset_type=kind, dataset_name=name,
        dataset_config=config, metric_type=_slug(figure.name), metric_name=one_line(figure.name),
        metric_value=figure.after.value, metric_args=figure.arguments or None,
    )  # fmt: skip


def _slug(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "_", plain.lower()).strip("_") or "value"
