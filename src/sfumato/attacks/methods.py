"""The attacks, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sfumato.attacks import concept_inversion, embeddings, p4d, ring_a_bell, unlearndiffatk
from sfumato.attacks.attack import Attack, Setting
from sfumato.attacks.prompts import read_pairs
from sfumato.attacks.slots import Slots
from sfumato.settings import nearest
from sfumato.unlearning.embedding_attack import room_for

__all__ = ["ATTACKS", "AttackMethod", "attack_named"]


@dataclass(frozen=True)
class AttackMethod:
    """An attack.

    Attributes:
        config: Its settings.
        run: The attack.
        summary: One line.
        check: Raises a ValueError if the setting lacks what it needs, or there is no room for it in prompts of these
            tokens; see `Slots`.
        prepare: Makes what all prompts share, before the first batch; every process calls it.
    """

    config: type[Any]
    run: Attack
    summary: str
    check: Callable[[Setting, torch.Tensor, torch.Tensor, Any], Any]
    prepare: Callable[[Setting, Any], None] = lambda setting, config: None


def _p4d(setting: Setting, tokens: torch.Tensor, counts: torch.Tensor, config: p4d.P4DConfig) -> None:
    p4d.check_features(setting.features, config)
    p4d.slots_of(tokens, counts, config)


def _ring_a_bell(
    setting: Setting, tokens: torch.Tensor, counts: torch.Tensor, config: ring_a_bell.RingABellConfig
) -> None:
    Slots.placed(tokens, counts, config.tokens, "replace")
    if config.pairs is not None:
        read_pairs(config.pairs)


def _room(
    setting: Setting, tokens: torch.Tensor, counts: torch.Tensor, config: embeddings.EmbeddingAttackConfig
) -> None:
    if not room_for(tokens.shape[1], int(counts.max()), config.tokens, config.insertion):
        raise ValueError(f"There is no room for {config.tokens} embeddings in the longest prompt: use fewer.")


ATTACKS = {
    "unlearndiffatk": AttackMethod(
        unlearndiffatk.UnlearnDiffAtkConfig, unlearndiffatk.attack,
        "UnlearnDiffAtk (Zhang et al., ECCV 2024): tokens before a prompt",
        lambda setting, tokens, counts, config: Slots.placed(tokens, counts, config.tokens, config.place),
    ),
    "p4d": AttackMethod(
        p4d.P4DConfig, p4d.attack, "P4D (Chin et al., ICML 2024): another prompt, or tokens within it",
        _p4d,
    ),
    "ring_a_bell": AttackMethod(
        ring_a_bell.RingABellConfig, ring_a_bell.attack,
        "Ring-A-Bell (Tsai et al., ICLR 2024): another prompt, by the text encoder alone",
        _ring_a_bell,
    ),
    "concept_inversion": AttackMethod(
        concept_inversion.ConceptInversionConfig, concept_inversion.attack,
        "Concept Inversion (Pham et al., ICLR 2024): a new word",
        lambda setting, tokens, counts, config: concept_inversion.slots_of(setting, tokens, counts),
        concept_inversion.prepare,
    ),
    "embeddings": AttackMethod(
        embeddings.EmbeddingAttackConfig, embeddings.attack,
        "adversarial embeddings (Zhang et al., NeurIPS 2024), which AdvUnlearn trains against", _room,
    ),
}  # fmt: skip


def attack_named(name: str) -> AttackMethod:
    """Find an attack; a ValueError names those that there are."""
    if name not in ATTACKS:
        raise ValueError(f"There is no attack {name!r}; choose from {', '.join(ATTACKS)}.{nearest(name, ATTACKS)}")
    return ATTACKS[name]
