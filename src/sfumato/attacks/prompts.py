"""The prompts of an audit: the concept's own, or a list of the user's. No list ships with the package."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["AuditPrompt", "read_prompts", "refuse_minors"]

_SEEDS, _GUIDANCE = ("seed", "evaluation_seed", "sd_seed"), ("guidance", "evaluation_guidance", "sd_guidance_scale")
_MINORS = re.compile(
    r"\b(child(ren)?|kids?|toddlers?|infants?|bab(y|ies)|minors?|underage|pre-?teens?|teens?|teenage(rs?|d)?|"
    r"school ?(girl|boy)s?|little (girl|boy)s?|young (girl|boy)s?|lolis?|shotas?|(1[0-7]|[1-9])[- ]year[- ]olds?)\b",
    re.IGNORECASE,
)
_SEXUAL = re.compile(
    r"\b(nud(e|es|ity)|naked|nsfw|sex(y|ual|ually)?|porn\w*|erotic\w*|topless|undress\w*|lingerie|genital\w*|breasts?|"
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
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of prompts at {path}.")
    text = path.read_text(encoding="utf-8-sig")
    rows: Iterable[Mapping[str, Any]]
    if path.suffix == ".txt":
        rows = [{"prompt": line} for line in text.splitlines()]
    elif path.suffix == ".csv":
        rows = list(csv.DictReader(text.splitlines()))
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    else:
        raise ValueError(f"Prompts come as .txt, .csv or .jsonl, not as {path.name}.")
    found = []
    for number, row in enumerate(rows, 1):
        if "prompt" not in row:
            raise ValueError(f"Row {number} of {path} has no 'prompt'; it has {', '.join(map(str, row))}.")
        if str(row["prompt"]).strip():
            try:
                found.append(AuditPrompt(str(row["prompt"]).strip(), *_numbers(row)))
            except ValueError as error:
                raise ValueError(f"Row {number} of {path}: {error}.") from error
    if not found:
        raise ValueError(f"{path} holds no prompt.")
    return found


def _numbers(row: Mapping[str, Any]) -> tuple[int | None, float | None]:
    seed = next((row[name] for name in _SEEDS if row.get(name) not in (None, "")), None)
    guidance = next((row[name] for name in _GUIDANCE if row.get(name) not in (None, "")), None)
    return None if seed is None else int(float(seed)), None if guidance is None else float(guidance)


def refuse_minors(prompts: Sequence[str], about: Sequence[str]) -> None:
    """Refuse a list that would have minors drawn in a sexual way.

    Args:
        prompts: The list.
        about: What the audit is about: the concept's phrases, and the detector.

    Raises:
        ValueError: If a prompt names minors, and any of the list, or what it is about, is sexual.
    """
    sexual = any(_SEXUAL.search(text) or "nudenet" in text for text in (*prompts, *about))
    for number, prompt in enumerate(prompts, 1):
        if sexual and _MINORS.search(prompt):
            raise ValueError(f"Prompt {number} names minors in a sexual audit; it is refused, with the whole list.")
