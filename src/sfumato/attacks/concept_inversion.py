r"""Concept Inversion: one new word that the unlearned model draws the concept for.

Textual inversion on the unlearned model theta: all is frozen but the embedding v of one placeholder, which learns
pictures x of the concept that the original drew,

.. math::
    v^* = \arg\min_v E_{x, \epsilon, t} \|\epsilon - \epsilon_\theta(x_t, t \mid c(v))\|^2 ,

with the placeholder where prompts c name the concept. It is then used in the same place of every prompt.

Pham et al., "Circumventing Concept Erasure Methods For Text-to-Image Generative Models", ICLR 2024, arXiv 2308.01508
(Gal et al., arXiv 2208.01618, for textual inversion). As released: 25 pictures, AdamW at 5e-3 times the batch of 16,
5,000 steps, from the embedding of a common word. The attacker feeds an embedding, which is more than a user of a
prompt can. The word is learnt once for all prompts.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch

from sfumato.attacks.attack import Answer, Batch, Round, Setting
from sfumato.attacks.slots import Slots
from sfumato.progress import Track
from sfumato.randomness import generator_for, permuted_indices, randint_for, randn_for
from sfumato.settings import check_ranges, check_types

__all__ = ["ConceptInversionConfig", "attack"]

PICTURE_STREAM, NOISE_STREAM, LEVEL_STREAM = 741, 742, 743  # keys that keep the random streams apart


@dataclass
class ConceptInversionConfig:
    """How the word is learnt.

    Attributes:
        pictures: Pictures of the concept to learn from.
        start: The word whose embedding it starts from.
        steps: Steps of AdamW.
        batch: Pictures a step.
        learning_rate: AdamW's.
        weight_decay: AdamW's.
    """

    pictures: int = 25
    start: str = "art"
    steps: int = 5000
    batch: int = 16
    learning_rate: float = 0.08
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        """Check the types and ranges."""
        check_types(self)
        least = {"pictures": 1, "steps": 1, "batch": 1, "weight_decay": 0}
        check_ranges(self, least, positive=("learning_rate",))


def attack(batch: Batch, config: ConceptInversionConfig) -> Generator[Round, Answer, None]:
    """Attack a batch; see `sfumato.attacks.attack`."""
    word = batch.setting.once("word", lambda: learn_word(batch.setting, config))
    slots = Slots.instead(batch.tokens, batch.counts, _phrases(batch.setting))
    rows = tuple(range(len(batch.prompts)))
    with torch.no_grad():
        told = batch.encode(rows, slots, word.expand(len(rows), 1, -1))
    yield Round(rows, conditioning=told, iterations=config.steps)


def learn_word(setting: Setting, config: ConceptInversionConfig) -> torch.Tensor:
    """Learn the placeholder's embedding, ``(1, 1, width)``."""
    victim, source = setting.victim, setting.source
    asked = [setting.concept.prompts[k % len(setting.concept.prompts)] for k in range(config.pictures)]
    drawn = source.generate(
        asked, [generator_for(setting.seed, PICTURE_STREAM, k) for k in range(len(asked))],
        num_inference_steps=setting.num_inference_steps, guidance_scale=setting.guidance_scale,
    )  # fmt: skip
    latents = victim.encode_images(drawn.to(victim.device))[0].float()
    tokens, counts = victim.tokenize(asked)
    slots = Slots.instead(tokens, counts, _phrases(setting))
    numbers, _ = victim.tokenize([config.start])
    word = victim.embed_tokens(numbers)[:, 1:2].clone().requires_grad_()
    adam = torch.optim.AdamW([word], lr=config.learning_rate, weight_decay=config.weight_decay)
    for step in Track(range(config.steps), "learn the word", shown=False):
        rows: np.ndarray = permuted_indices(setting.seed, len(asked), step * config.batch, config.batch)
        some = rows.tolist()
        keys = [(setting.seed, NOISE_STREAM, step, k) for k in range(len(some))]
        clean, noise = latents[some], randn_for(keys, latents.shape[1:]).to(latents)
        keys = [(setting.seed, LEVEL_STREAM, step, k) for k in range(len(some))]
        times = randint_for(keys, victim.num_train_timesteps).to(latents.device)
        with torch.enable_grad():
            told = slots.rows(some).encode(victim, tokens[some], word.expand(len(some), 1, -1))
            said = victim.ask(victim.denoiser, victim.add_noise(clean, noise, times), times, told)
            loss = (said - victim.target(clean, noise, times)).square().mean()
            word.grad = torch.autograd.grad(loss, word)[0]
        adam.step()
    return word.detach()


def _phrases(setting: Setting) -> list[list[int]]:
    """The tokens of what names the concept: the longest names first."""
    tokens, counts = setting.victim.tokenize(list(dict.fromkeys((*setting.concept.names, *setting.concept.phrases))))
    numbers = tokens if tokens.ndim == 2 else tokens[..., 0]
    phrases = [row[1 : 1 + count] for row, count in zip(numbers.tolist(), counts.tolist(), strict=True) if count]
    return sorted(phrases, key=len, reverse=True)
