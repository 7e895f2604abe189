"""Unlearning accuracy and retain accuracies, after UnlearnCanvas (Zhang et al., arXiv 2402.11846).

For a concept, with prompts that name a word of every domain:

* UA, unlearning accuracy: share of the concept's prompts whose picture is *not* judged to show it.
* IRA, in-domain retain accuracy: share of the other prompts whose picture shows the word it should of the concept's
  domain (of all its domains at once, if it has several).
* CRA, cross-domain retain accuracy: share of the other prompts whose picture shows, in every other domain at once, the
  word it should.

Several concepts that were forgotten together count as one: a prompt is one of theirs if it names any of them, and its
picture counts for UA if it shows none. Every share comes with its 95 % Wilson interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline

from sfumato.concepts import Vocabulary
from sfumato.evaluation.generation import draw
from sfumato.evaluation.judge import Judge
from sfumato.evaluation.metrics import Proportion, wilson

__all__ = ["Protocol", "UnlearningScores", "score", "score_pipeline", "shows"]


@dataclass(frozen=True)
class UnlearningScores:
    """The three accuracies, each with its interval."""

    ua: Proportion
    ira: Proportion
    cra: Proportion

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Give plain numbers for JSON."""
        return {name: getattr(self, name).as_dict() for name in ("ua", "ira", "cra")}


@dataclass(frozen=True)
class Protocol:
    """Balanced prompts: every combination of the vocabulary's words, some of them several times.

    Attributes:
        targets: The attributes of each concept, for instance ``({"garment": "sneaker"},)``.
        attributes: What each prompt names, ``N`` of them.
        prompts: The prompts, ``N`` of them.
    """

    targets: tuple[Mapping[str, str], ...]
    attributes: tuple[Mapping[str, str], ...]
    prompts: tuple[str, ...]

    @classmethod
    def for_concept(
        cls, vocabulary: Vocabulary, concept: str | Sequence[str], *, forget_repeats: int, retain_repeats: int
    ) -> Protocol:
        """Build the protocol for a concept.

        Args:
            vocabulary: The model's words.
            concept: What was forgotten, a phrase or several.
            forget_repeats: Pictures for each prompt that names it.
            retain_repeats: Pictures for each other prompt.
        """
        targets = tuple(vocabulary.parse(phrase) for phrase in ([concept] if isinstance(concept, str) else concept))
        rows = vocabulary.combinations({})
        forget = [row for row in rows if shows(row, targets)]
        retain = [row for row in rows if not shows(row, targets)]
        attributes = tuple(forget * forget_repeats + retain * retain_repeats)
        return cls(targets, attributes, tuple(vocabulary.prompt(row) for row in attributes))


def shows(row: Mapping[str, str], targets: Sequence[Mapping[str, str]]) -> bool:
    """Whether a row of attributes, domain to word, has those of any target."""
    return any(target.items() <= row.items() for target in targets)


def score(protocol: Protocol, judge: Judge, pictures: torch.Tensor) -> UnlearningScores:
    """Judge pictures of a protocol's prompts.

    Args:
        protocol: What the pictures should show.
        judge: Knows every domain of the protocol.
        pictures: ``(N, 3, H, W)`` in [0, 1], in the order of the prompts.

    Returns:
        UA, IRA and CRA.
    """
    forget: list[tuple[Mapping[str, str], Mapping[str, str]]] = []
    retain: list[tuple[Mapping[str, str], Mapping[str, str]]] = []
    for row, verdict in zip(protocol.attributes, judge.describe(pictures), strict=True):
        (forget if shows(row, protocol.targets) else retain).append((row, verdict))
    domains = {domain for target in protocol.targets for domain in target}
    others = [name for name in judge.domains if name not in domains]
    return UnlearningScores(
        ua=_share([not shows(verdict, protocol.targets) for _, verdict in forget]),
        ira=_share([all(verdict[name] == row[name] for name in domains) for row, verdict in retain]),
        cra=_share([all(verdict[name] == row[name] for name in others) for row, verdict in retain]),
    )


def _share(outcomes: Sequence[bool]) -> Proportion:
    return wilson(sum(outcomes), len(outcomes))


def score_pipeline(
    pipe: DiffusionPipeline, protocol: Protocol, judge: Judge, *, description: str = "draw", **generation: float
) -> tuple[UnlearningScores, torch.Tensor]:
    """Draw a protocol's pictures and judge them; `generation` goes to `sfumato.evaluation.generation.draw`.

    Returns:
        The scores and the pictures ``(N, 3, H, W)``.
    """
    pictures = draw(pipe, protocol.prompts, description=description, **generation)  # type: ignore[arg-type]
    return score(protocol, judge, pictures), pictures
