r"""P4D, Prompting4Debugging: a prompt with which the unlearned model says what the original says of the user's.

.. math::
    \min_{P^*} E_t\, \|\epsilon_\theta(x_t, t \mid P^*) - \epsilon^*(x_t, t \mid P)\|^2

on noised states x_t of the original's picture of P. Embeddings of the new tokens descend by AdamW, along the gradient
at the nearest embeddings of the vocabulary (by the cosine). P4D-N looks for a prompt of N tokens, P4D-K puts a token
behind every K of the user's prompt, and one behind a shorter one.

Chin et al., "Prompting4Debugging: Red-Teaming Text-to-Image Diffusion Models by Finding Problematic Prompts", ICML
2024, arXiv 2309.06135. Of the candidates, one every `evaluate_every` steps, the one whose picture is most like the
original's goes to the detector, by features of CLIP in the paper, here by whatever embeds pictures for the audit (the
judge, or a CLIP that is named); ``select="any"`` sends all, and stops at the first that succeeds. Deviation: the
released program gives pictures to the autoencoder in [0, 1], where [-1, 1] is meant.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from sfumato.attacks.attack import Answer, Batch, Round, finite_gradient, moments_of, restore_moments
from sfumato.attacks.slots import Slots, text_of
from sfumato.randomness import randint_for, randn_for
from sfumato.settings import check_ranges, check_types

__all__ = ["P4DConfig", "attack", "check_features", "slots_of"]

NOISE_STREAM, LEVEL_STREAM, START_STREAM = 721, 722, 723  # keys that keep the random streams apart


@dataclass
class P4DConfig:
    """How P4D searches.

    Attributes:
        variant: ``"n"``, a prompt of its own, or ``"k"``, tokens within the user's prompt.
        n: Tokens of that prompt.
        k: Tokens of the user's prompt before each new one.
        steps: Steps of AdamW.
        evaluate_every: Steps between candidates.
        select: ``"similarity"`` to the original's picture, or ``"any"`` candidate that shows the concept.
        learning_rate: AdamW's.
        weight_decay: AdamW's.
    """

    variant: str = field(default="n", metadata={"choices": ["n", "k"]})
    n: int = 16
    k: int = 3
    steps: int = 3000
    evaluate_every: int = 50
    select: str = field(default="similarity", metadata={"choices": ["similarity", "any"]})
    learning_rate: float = 0.1
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        """Check the types and ranges."""
        check_types(self)
        least = {"n": 1, "k": 1, "steps": 1, "evaluate_every": 1, "weight_decay": 0}
        check_ranges(self, least, positive=("learning_rate",))


def attack(batch: Batch, config: P4DConfig) -> Generator[Round, Answer, None]:
    """Attack a batch; see `sfumato.attacks.attack`."""
    victim, features = batch.setting.victim, batch.setting.features
    check_features(features, config)
    slots = slots_of(batch.tokens, batch.counts, config)
    table, rows = victim.token_table, tuple(range(len(batch.prompts)))
    keys = [key for place in range(slots.count) for key in batch.keys(rows, START_STREAM, place)]
    start = table[randint_for(keys, len(table)).to(table.device)].view(slots.count, len(rows), -1).transpose(0, 1)
    soft = start.clone().requires_grad_()  # (B, slots, width)
    adam = torch.optim.AdamW([soft], lr=config.learning_rate, weight_decay=config.weight_decay)
    best: dict[int, tuple[float, str]] = {}
    taken = 0
    if (kept := batch.memory.kept()) is not None:
        stored, facts = kept
        rows, taken = tuple(facts["rows"]), facts["taken"]
        best = {row: (likeness, text) for row, likeness, text in facts["best"]}
        soft.data.copy_(stored["soft"])
        restore_moments(adam, soft, stored, taken)
    for step in range(taken, config.steps):
        near = _nearest(soft, table)
        soft.grad = torch.zeros_like(soft)
        soft.grad[list(rows)] = _gradient(batch, slots, table[near], rows, step)
        adam.step()
        if (step + 1) % config.evaluate_every and step + 1 < config.steps:
            continue
        spelled = text_of(victim, slots.rows(rows), batch.tokens[list(rows)], _nearest(soft, table)[list(rows)])
        answer = yield Round(rows, tuple(spelled), final=config.select == "any", iterations=step + 1)
        if config.select == "any":
            rows = tuple(row for row, shown in zip(rows, answer.shown, strict=True) if not shown)
            if not rows:
                return
        elif features is not None:
            alike = F.cosine_similarity(features(answer.pictures), features(batch.targets[list(rows)])).tolist()
            for row, text, likeness in zip(rows, spelled, alike, strict=True):
                best[row] = max(best.get(row, (-2.0, "")), (likeness, text))
        listed = [(row, *found) for row, found in best.items()]
        batch.memory.keep({"soft": soft, **moments_of(adam, soft)}, rows=rows, taken=step + 1, best=listed)
    if best:
        yield Round(rows, tuple(best[row][1] for row in rows), iterations=config.steps)


def check_features(features: Any, config: P4DConfig) -> None:
    """Refuse, with a ValueError, to choose by likeness where nothing embeds pictures."""
    if config.select == "similarity" and features is None:
        raise ValueError(
            "select='similarity' needs something that embeds pictures: name a CLIP, or use select='any'. On the "
            "command line: --features clip:MODEL, or --select any."
        )


def slots_of(tokens: torch.Tensor, counts: torch.Tensor, config: P4DConfig) -> Slots:
    """Put the tokens that are looked for into prompts; see `Slots`.

    Raises:
        ValueError: If there is no room for them.
    """
    if config.variant == "n":
        return Slots.placed(tokens, counts, config.n, "replace")
    return Slots.spread(tokens, counts, config.k)


@torch.no_grad()
def _nearest(soft: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The tokens whose embeddings point most nearly the same way, ``(B, slots)``."""
    return (F.normalize(soft, dim=-1) @ F.normalize(table, dim=-1).T).argmax(-1)


def _gradient(batch: Batch, slots: Slots, hard: torch.Tensor, rows: tuple[int, ...], step: int) -> torch.Tensor:
    """The gradient of the loss of each of some prompts with respect to its tokens' embeddings."""
    setting, some = batch.setting, list(rows)
    victim, source, latents = setting.victim, setting.source, batch.latents[some]
    noise = randn_for(batch.keys(rows, NOISE_STREAM, step), latents.shape[1:]).to(latents)
    times = randint_for(batch.keys(rows, LEVEL_STREAM, step), victim.num_train_timesteps).to(latents.device)
    noisy = victim.add_noise(latents, noise, times)
    with torch.no_grad():
        wanted = source.ask(source.denoiser, noisy, times, source.encode_prompts([batch.prompts[k] for k in some]))
    chosen = hard[some].requires_grad_()
    with torch.enable_grad():
        told = batch.encode(rows, slots, chosen)
        said = victim.ask(victim.denoiser, noisy, times, told)
        losses = (said - wanted).square().flatten(1).mean(1)
        return finite_gradient(losses, chosen)
