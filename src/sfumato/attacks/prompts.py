"""The prompts of an audit: the concept's own, or a list of the user's. No list ships with the package."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.families import StableDiffusion
from sfumato.settings import check_seed

__all__ = ["AuditPrompt", "read_pairs", "read_prompts", "refuse_minors", "warn_of_cuts"]

logger = logging.getLogger(__name__)

_SEEDS, _GUIDANCE = ("seed", "evaluation_seed", "sd_seed"), ("guidance", "evaluation_guidance", "sd_guidance_scale")
_UNDER_18 = (
    r"(?<![\d.,])(?:1[0-7]|0?[1-9]|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|"
    r"fifteen|sixteen|seventeen)"
)
_MINORS = re.compile(
    r"\b(?:child(?:ren)?|childlike|kids?|kiddie|toddlers?|infants?|newborns?|bab(?:y|ies)|minors?|under[- ]?aged?|"
    r"juveniles?|adolescen(?:ts?|ce)|pubescents?|pre-?pubescents?|pre-?teens?|tweens?|tweenagers?|teens?|"
    r"teenage(?:rs?|d)?|school ?(?:girl|boy|child|kid)\w*|kindergart\w*|pre-?school\w*|"
    r"(?:little|young) (?:girl|boy)s?|lolis?|lolitas?|lolicon|shotas?|shotacon)\b"
    rf"|\b{_UNDER_18}[- ]*(?:years?|yrs?|(?:month|week|day)s?[- ]*(?:old|of[- ]age))\b"
    rf"|\b{_UNDER_18}[- ]*(?:y\.? ?/? ?o\b)"
    rf"|\b(?:aged?|ages)[- :]*(?:of[- ])?{_UNDER_18}\b(?! *[-/]? *(?:\d|%))"
    rf"|\b(?:is|turn(?:s|ed)|under|only|just|barely|not yet) {_UNDER_18}\b(?! *(?:%|\w))"
    r"|\bunder (?:the age of )?(?:18|eighteen)\b",
    re.IGNORECASE,
)
"""Words for people below 18, and their ages, in digits and words."""
_YOUNG = re.compile(r"\b(girl|boy)s?\b", re.IGNORECASE)  # said of adults too
_SEXUAL = re.compile(
    r"\b(nud(e|es|ity|ist|ists)|naked(ness)?|nsfw|sex(y|ual|ually|uali[sz]ed)?|porn\w*|erotic\w*|topless|bottomless|"
    r"undress\w*|unclothed|lingerie|panties|genital\w*|breasts?|nipples?|vagina\w*|penis\w*|masturbat\w*|orgasm\w*|"
    r"hentai|bikini)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class AuditPrompt:
    """A prompt that asks for the concept.

    Attributes:
        text: It.
        seed: Of its picture, as in published lists; None takes the audit's seed and the prompt's number.
        guidance_scale: Of its picture; None takes the audit's.
    """

    text: str
    seed: int | None = None
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if not isinstance(self.text, str) or not self.text.strip():
            raise ValueError(f"A prompt must be a text that is not empty, got {self.text!r}")
        if self.seed is not None:
            check_seed(self.seed)
        scale = self.guidance_scale
        if scale is not None and not 1 <= scale < math.inf:
            raise ValueError(f"A guidance scale must be at least 1, got {scale}")


def read_prompts(path: str | Path) -> list[AuditPrompt]:
    """Read a list of prompts.

    Args:
        path: ``.txt``, a prompt a line; or ``.csv`` or ``.jsonl`` with ``prompt``, and if it has them a seed
            (``seed``, ``evaluation_seed`` or ``sd_seed``) and a guidance scale (``guidance``, ``evaluation_guidance``
            or ``sd_guidance_scale``), as I2P and UnlearnDiffAtk have.

    Returns:
        The prompts, in their order.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no prompt, or is of another kind.
    """
    found = []
    for number, row in enumerate(_rows(Path(path)), 1):
        if not isinstance(row, Mapping) or not isinstance(row.get("prompt"), str):
            has = f"; it has {', '.join(map(str, row))}" if isinstance(row, Mapping) and "prompt" not in row else ""
            raise ValueError(f"Row {number} of {path} has no 'prompt'{has}.")
        if row["prompt"].strip():
            try:
                found.append(AuditPrompt(row["prompt"].strip(), *_numbers(row)))
            except (ValueError, TypeError, OverflowError) as error:
                raise ValueError(f"Row {number} of {path}: {str(error).rstrip('.')}.") from error
    if not found:
        raise ValueError(f"{path} holds no prompt.")
    return found


def read_pairs(path: str | Path) -> list[tuple[str, str]]:
    """Read pairs of prompts with and without a concept.

    Args:
        path: ``.csv`` or ``.jsonl`` with ``with`` and ``without``; a prompt without it may be empty.

    Returns:
        The pairs, in their order.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no pair, or is of another kind.
    """
    found = []
    for number, row in enumerate(_rows(Path(path)), 1):
        if not isinstance(row, Mapping) or not {"with", "without"} <= row.keys():
            raise ValueError(f"Row {number} of {path} is no pair: it needs 'with' and 'without'.")
        pair = str(row["with"] or "").strip(), str(row["without"] or "").strip()
        if not pair[0] or pair[0] == pair[1]:
            raise ValueError(f"Row {number} of {path} is no pair: its prompts do not differ, or the first is empty.")
        found.append(pair)
    if not found:
        raise ValueError(f"{path} holds no pair of prompts.")
    return found


def _rows(path: Path) -> list[Any]:
    """The rows of a file of prompts."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of prompts at {path}.")
    if path.suffix not in (".txt", ".csv", ".jsonl"):
        raise ValueError(f"Prompts come as .txt, .csv or .jsonl, not as {path.name}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline="")))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} can't be read as {path.suffix[1:]} in UTF-8: {error}.") from error
    lines = text.split("\n")  # and at nothing else that Unicode takes for the end of a line
    if path.suffix == ".txt":
        return [{"prompt": line} for line in lines]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"Line {number} of {path} is not valid JSON: {error}.") from error
    return rows


def _numbers(row: Mapping[str, Any]) -> tuple[int | None, float | None]:
    seed = next((row[name] for name in _SEEDS if row.get(name) not in (None, "")), None)
    guidance = next((row[name] for name in _GUIDANCE if row.get(name) not in (None, "")), None)
    return None if seed is None else _whole(seed), None if guidance is None else float(guidance)


def _whole(value: Any) -> int:
    """A whole number, which tables may hold as 5.0, and never rounded."""
    try:
        return int(value) if isinstance(value, str) else operator.index(value)
    except (ValueError, TypeError):
        if not float(value).is_integer():
            raise ValueError(f"a seed must be a whole number, got {value!r}") from None
        return int(float(value))


def refuse_minors(prompts: Sequence[str], about: Sequence[str]) -> None:
    """Refuse a list that would have minors drawn in a sexual way.

    It is a filter of words, which knows no more than those it has: it refuses some prompts about adults ("a nude
    girl"), and other words for minors pass.

    Args:
        prompts: The list.
        about: What the audit is about: the concept's phrases, and the detector.

    Raises:
        ValueError: If a prompt names minors, and any of the list, or what it is about, is sexual; or if it names boys
            or girls, and is sexual itself.
    """
    sexual = any(_SEXUAL.search(text) or "nudenet" in text for text in (*prompts, *about))
    for number, prompt in enumerate(prompts, 1):
        if sexual and (_MINORS.search(prompt) or (_YOUNG.search(prompt) and _SEXUAL.search(prompt))):
            raise ValueError(f"Prompt {number} names minors in a sexual audit; it is refused, with the whole list.")


def warn_of_cuts(family: StableDiffusion, prompts: Sequence[str]) -> None:
    """Say what the tokenizers only log: that a prompt's end is not seen, by the models and so by the attack."""
    cut = [prompt for prompt in dict.fromkeys(prompts) if family.is_cut(prompt)]
    if cut:
        others = f", and those of {len(cut) - 1} other prompts," if len(cut) > 1 else ""
        logger.warning(
            "The end of the prompt %r%s is not seen: longer than the text encoder's limit, it is cut.", cut[0], others
        )
