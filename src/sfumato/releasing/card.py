"""The model card: huggingface_hub's, from ``templates/card.md.j2``; text from outside stays mere text."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from sfumato.attacks.methods import ATTACKS
from sfumato.releasing.base import Base
from sfumato.releasing.commands import file_name, recipe_of, unlearn_command
from sfumato.releasing.contents import Finished
from sfumato.releasing.custom_code import CustomCode
from sfumato.releasing.results import Figure, Finding, attack_figures, eval_results, evaluation_figures, one_line
from sfumato.releasing.snippets import Code, loading_snippets
from sfumato.unlearning.methods import METHODS

__all__ = ["Contents", "make_card", "require_jinja"]

_MARKDOWN = re.compile(r"([\\`*_\[\]|~$#!])")


@dataclass(frozen=True)
class Contents:
    """All that a card speaks of.

    Attributes:
        finished: The run.
        formats: What is in the release.
        base: The original.
        licence: The fields that state the result's licence.
        code: What code of ours the pipeline needs.
        base_code: What code of ours the original needs, if it is in the release.
        evaluation: What the evaluation found; None if there was none.
        attacks: What the attacks found.
        audited: What their commands in the card audit: the release, ``"."``, or the run that the card repeats.
        name: The release's Hub id, or its folder's name.
    """

    finished: Finished
    formats: Sequence[str]
    base: Base
    licence: Mapping[str, str]
    code: CustomCode
    base_code: CustomCode
    evaluation: Finding | None
    attacks: Sequence[Finding]
    audited: str
    name: str

    @property
    def findings(self) -> list[Finding]:
        """All that was found."""
        return [*([] if self.evaluation is None else [self.evaluation]), *self.attacks]


def require_jinja() -> None:
    """Raise an ImportError, before any work, unless the package that fills the template is there."""
    if find_spec("jinja2") is None:
        raise ImportError("The model card needs jinja2: run pip install 'sfumato[eval]'.")


def make_card(contents: Contents) -> ModelCard:
    """Write the card.

    Args:
        contents: What to speak of.

    Returns:
        The card, whose metadata reads back as it was.

    Raises:
        ValueError: If it does not.
    """
    import jinja2

    forget = str(contents.finished.manifest["forget"])
    data = _metadata(contents)
    source = resources.files("sfumato.releasing").joinpath("templates", "card.md.j2").read_text("utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )  # no autoescape: what is escaped is done so for Markdown, by `_escaped`
    text = environment.from_string(source).render(card_data=data.to_yaml(), card=_escaped(_variables(contents)))
    card = ModelCard(text)
    if card.data.to_dict() != data.to_dict():
        raise ValueError(f"The card's metadata does not read back as it was written; rename the concept {forget!r}.")
    return card


def _metadata(contents: Contents) -> ModelCardData:
    manifest, base = contents.finished.manifest, contents.base
    evaluation = None if contents.evaluation is None else contents.evaluation.content
    found = eval_results(manifest["forget"], evaluation, [attack.content for attack in contents.attacks])
    relation = "adapter" if list(contents.formats) == ["lora"] else "finetune"
    known: dict[str, Any] = {"base_model": base.name, "base_model_relation": relation} if base.public else {}
    stated: dict[str, Any] = dict(contents.licence)
    index = contents.finished.index if "full" in contents.formats else {}
    conditional = "ClassConditional" in str(index.get("_class_name")) or "DiT" in str(index.get("_class_name"))
    return ModelCardData(
        **stated, **known, library_name="diffusers", model_name=one_line(contents.name),
        pipeline_tag="unconditional-image-generation" if conditional else "text-to-image",
        tags=["diffusers", "sfumato", "concept-unlearning", "machine-unlearning", one_line(manifest["method"]),
              *(["lora"] if "lora" in contents.formats else [])],
        eval_results=found or None,
    )  # fmt: skip


def _variables(contents: Contents) -> dict[str, Any]:
    finished, base = contents.finished, contents.base
    manifest = finished.manifest
    concept, saved = manifest["concept"], manifest["saved"]
    _, local = recipe_of(manifest)
    lora = saved.get("lora") if "lora" in contents.formats else None
    return {
        "base": base.name,
        "forget": manifest["forget"],
        "method": Code(manifest["method"]),  # checked against the methods there are
        "verdict": _verdict(manifest.get("verdict")),
        "snippets": loading_snippets(
            finished, contents.formats, contents.code, contents.base_code, base, contents.name
        ),
        "formats": [Code(name) for name in contents.formats],
        "custom": ", ".join(dict.fromkeys([*contents.code.names, *contents.base_code.names])),
        "carried": base.carried_by(contents.formats),
        "lora_missing": None if lora is None else f"{100 * lora['missing']:.2g} %",
        "lora_alone": set(saved) == {"lora"},
        "lora_rank": None if lora is None else lora["rank"],
        "anchors": _shortened(concept.get("anchors", []), "the empty prompt", METHODS[manifest["method"]].anchors),
        "retained": _shortened(concept.get("retain", []), "nothing", METHODS[manifest["method"]].retains),
        "changed": ", ".join(finished.changed),
        "licence": _licence(contents),
        "seed": manifest.get("seed"),
        "base_fingerprint": manifest.get("base_fingerprint"),
        "result_fingerprint": manifest["result_fingerprint"],
        "settings": sorted(_named_settings(manifest, local).items()),
        "versions": sorted(manifest.get("versions", {}).items()),
        "sfumato_version": manifest.get("versions", {}).get("sfumato", ""),
        "evaluation": None if contents.evaluation is None else _evaluation(contents.evaluation.content),
        "attacks": [_attack(attack.content) for attack in contents.attacks],
        "unlearn_command": Code.block("bash", unlearn_command(manifest, base)),
        "original": ""
        if base.public
        else f"{base.name} was a folder of whoever made this: give your own by --model and --original.",
        "local_settings": ", ".join(local),
        **_audits(contents),
    }


def _audits(contents: Contents) -> dict[str, Any]:
    """The commands of the audits, their options that a reader has to bring, and the audits that were made by calls."""
    findings = contents.findings
    commands = [str(finding.content["command"]) for finding in findings if finding.content["command"]]
    brought = dict.fromkeys(f"--{name}" for finding in findings for name in finding.brought)
    return {
        "audit_commands": Code.block("bash", "\n".join(commands)) if commands else "",
        "audited": "this release" if contents.audited == "." else "that result",
        "brought": ", ".join(brought),
        "calls": ", ".join(finding.file for finding in findings if not finding.content["command"]),
    }


def _named_settings(manifest: Mapping[str, Any], local: Sequence[str]) -> dict[str, Any]:
    return {name: file_name(value) if name in local else value for name, value in manifest["settings"].items()}


def _verdict(stated: Any) -> str:
    """What the check at the end of the run found; see `sfumato.unlearning.verdict`."""
    found = stated if isinstance(stated, Mapping) else {}
    said = []
    if "gone" in found and "shown_before" in found:
        shares = f"{_percent(found['shown_before'])} before and {_percent(1 - found['gone'])} after"
        said.append(f"of the pictures of the concept's prompts, {shares} were judged to show it")
        ends = [
            f"{word} {_percent(ends[0])} to {_percent(ends[1])}" for word, ends in found.get("neighbours", {}).items()
        ]
        said += [f"pictures of other words judged right, before to after: {', '.join(ends)}"] if ends else []
    elif "moved" in found and "drifted" in found:
        change = f"by {found['moved']:.2f} for the concept and by {found['drifted']:.2f} for what is retained"
        said.append(f"relative to how far other prompts are, the predictions changed {change}")
    return f"{'; '.join(said)}. This is a quick check of few samples, not an evaluation." if said else ""


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _worded(settings: Any) -> str:
    if isinstance(settings, Mapping):
        return ", ".join(f"{name} {_worded(value)}" for name, value in settings.items()) or "none"
    if isinstance(settings, list | tuple):
        return ", ".join(map(_worded, settings)) or "none"
    return f"{settings:.4g}" if isinstance(settings, float) else str("none" if settings is None else settings)


def _shortened(prompts: Sequence[str], empty: str, used: bool) -> str:
    """Some of the prompts, if the method looks at them."""
    if not used:
        return "the method has no use for such prompts"
    named = [prompt or empty for prompt in dict.fromkeys(prompts)]
    return "; ".join(named[:5]) + (f"; and {len(named) - 5} more" if len(named) > 5 else "")


def _licence(contents: Contents) -> str:
    given, own = contents.licence.get("license_name") or contents.licence["license"], contents.base.licence
    inherited = own.get("license_name") or own.get("license")
    return given if inherited in (None, given) else f"{given} (that of {contents.base.name}: {inherited})"


def _rows(figures: Sequence[Figure]) -> list[dict[str, str]]:
    return [
        {
            "name": figure.name, "before": "" if figure.before is None else figure.before.worded,
            "after": figure.after.worded, "counted": figure.after.counted,
        }
        for figure in figures
    ]  # fmt: skip


def _evaluation(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_judged(found["detector"], found["detector"].get("rule")), "figures": _rows(evaluation_figures(found)),
        "settings": _worded({name: value for name, value in found["settings"].items() if value is not None}),
    }  # fmt: skip


def _attack(found: Mapping[str, Any]) -> dict[str, Any]:
    method, figures = ATTACKS[found["attack"]], attack_figures(found)
    rates = {figure.name: f"{100 * figure.after.value:.1f} %" for figure in figures}
    return {
        **_judged(found["detector"], found["rule"]), "figures": _rows(figures), "name": found["attack"],
        "summary": method.summary, "settings": _worded(found["settings"]), "rate": rates.get("ASR", ""),
        "plain": rates.get("Pre-ASR", "not measured"),
    }  # fmt: skip


def _judged(facts: Mapping[str, Any], rule: Any) -> dict[str, str]:
    """What looked at the pictures, and when that counts."""
    named = {name: value for name, value in facts.items() if name not in ("rule", "domains")}  # a judge's are many
    detector = _worded(named.pop("detector", None)) + (f" ({_worded(named)})" if named else "")
    return {"detector": detector, "rule": _worded(rule)}


def _escaped(value: Any) -> Any:
    """Make every text in nested lists and mappings mere text, for HTML, Markdown and its tables."""
    if isinstance(value, Code) or value is None:
        return value
    if isinstance(value, Mapping):
        return {name: _escaped(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(inner) for inner in value]
    return _MARKDOWN.sub(r"\\\1", html.escape(one_line(value), quote=False))
