"""The attacks, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sfumato.attacks import concept_inversion, embeddings, p4d, ring_a_bell, unlearndiffatk
from sfumato.attacks.attack import Attack
from sfumato.attacks.slots import Slots
from sfumato.unlearning.embedding_attack import room_for

__all__ = ["ATTACKS", "AttackMethod", "attack_named"]


@dataclass(frozen=True)
class AttackMethod:
    """An attack.

    Attributes:
        config: Its settings.
        run: The attack.
        summary: One line.
        check: Raises a ValueError if there is no room for it in prompts of these tokens; see `Slots`.
    """

    config: type[Any]
    run: Attack
    summary: str
    check: Callable[[torch.Tensor, torch.Tensor, Any], Any]


def _room(tokens: torch.Tensor, counts: torch.Tensor, config: embeddings.EmbeddingAttackConfig) -> None:
    if not room_for(tokens.shape[1], int(counts.max()), config.tokens, config.insertion):
        raise ValueError(f"There is no room for {config.tokens} embeddings in the longest prompt: use fewer.")


ATTACKS = {
    "unlearndiffatk": AttackMethod(
        unlearndiffatk.UnlearnDiffAtkConfig, unlearndiffatk.attack,
        "UnlearnDiffAtk (Zhang et al., ECCV 2024): tokens before a prompt",
        lambda tokens, counts, config: Slots.placed(tokens, counts, config.tokens, config.place),
    ),
    "p4d": AttackMethod(
        p4d.P4DConfig, p4d.attack, "P4D (Chin et al., ICML 2024): another prompt, or tokens within it",
        lambda tokens, counts, config: p4d.slots_of(tokens, counts, config),
    ),
    "ring_a_bell": AttackMethod(
        ring_a_bell.RingABellConfig, ring_a_bell.attack,
        "Ring-A-Bell (Tsai et al., ICLR 2024): another prompt, by the text encoder alone",
        lambda tokens, counts, config: Slots.placed(tokens, counts, config.tokens, "replace"),
    ),
    "concept_inversion": AttackMethod(
        concept_inversion.ConceptInversionConfig, concept_inversion.attack,
        "Concept Inversion (Pham et al., ICLR 2024): a new word",
        lambda tokens, counts, config: Slots.instead(tokens, counts, []),
    ),
    "embeddings": AttackMethod(
        embeddings.EmbeddingAttackConfig, embeddings.attack,
        "adversarial embeddings (Zhang et al., NeurIPS 2024), which AdvUnlearn trains against", _room,
    ),
}  # fmt: skip


def attack_named(name: str) -> AttackMethod:
    """Find an attack; a ValueError names those that there are."""
    if name not in ATTACKS:
        raise ValueError(f"There is no attack {name!r}; choose from {', '.join(ATTACKS)}.")
    return ATTACKS[name]
