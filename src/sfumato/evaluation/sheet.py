"""What an evaluation draws: the concept's prompts, those to be kept, and neighbours, each with a seed of its own."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from sfumato.concepts import Concept, Vocabulary
from sfumato.evaluation.pictures import Request
from sfumato.evaluation.scores import Sighting
from sfumato.evaluation.unlearning import Protocol, shows

__all__ = ["free_sheet", "vocabulary_sheet"]


def vocabulary_sheet(
    vocabulary: Vocabulary, phrases: Sequence[str], *, seed: int, forget_repeats: int, retain_repeats: int
) -> list[Sighting]:
    """List the pictures of a vocabulary's protocol, every combination of its words; nothing is found in them yet.

    Args:
        vocabulary: The model's.
        phrases: What was forgotten.
        seed: Seeds the pictures.
        forget_repeats: Pictures for each prompt that names the concept.
        retain_repeats: Pictures for each other prompt.
    """
    protocol = Protocol.for_concept(vocabulary, phrases, forget_repeats=forget_repeats, retain_repeats=retain_repeats)
    rows = [
        ("forget" if shows(row, protocol.targets) else "retain", prompt, row)
        for row, prompt in zip(protocol.attributes, protocol.prompts, strict=True)
    ]
    return _seeded(rows, seed)


def free_sheet(
    concept: Concept, neighbours: Mapping[str, str], group: str | None, *, seed: int, forget_repeats: int,
    retain_repeats: int,
) -> list[Sighting]:  # fmt: skip
    """List the pictures of a concept in free words; nothing is found in them yet.

    Args:
        concept: Its prompts, and those to be kept.
        neighbours: Other words to the prompts that ask for them.
        group: The detector's group that has the neighbours as labels; None if it has none.
        seed: Seeds the pictures.
        forget_repeats: Pictures for each of the concept's prompts.
        retain_repeats: Pictures for each prompt to be kept; of a neighbour, as many as of the concept altogether.
    """
    count = forget_repeats * len(concept.prompts)
    asked = [(word, prompt) for word, prompt in neighbours.items() for _ in range(count)]
    rows: list[tuple[str, str, Mapping[str, str]]] = [
        *(("forget", prompt, {}) for prompt in concept.prompts * forget_repeats),
        *(("retain", prompt, {}) for prompt in concept.retain * retain_repeats),
        *(("neighbour", prompt, {group or "neighbour": word}) for word, prompt in asked),
    ]
    return _seeded(rows, seed)


def _seeded(rows: Iterable[tuple[str, str, Mapping[str, str]]], seed: int) -> list[Sighting]:
    """Seeds depend on the prompt and its repeat alone, so that evaluations of other concepts share pictures."""
    seen: Counter[str] = Counter()
    found = []
    for kind, prompt, words in rows:
        key = (seed, zlib.crc32(prompt.encode()), seen[prompt])
        seen[prompt] += 1
        found.append(Sighting("result", kind, Request(prompt, key), dict(words)))
    return found
