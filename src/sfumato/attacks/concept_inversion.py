r"""Concept Inversion: one new word that the unlearned model draws the concept for.

Textual inversion on the unlearned model theta: all is frozen but the embedding v of one placeholder, which learns
pictures x of the concept that the original drew,

.. math::
    v^* = \arg\min_v E_{x, \epsilon, t} \|\epsilon - \epsilon_\theta(x_t, t \mid c(v))\|^2 ,

with the placeholder where prompts c name the concept. It is then used in the same place of every prompt.

Pham et al., "Circumventing Concept Erasure Methods For Text-to-Image Generative Models", ICLR 2024, arXiv 2308.01508
(Gal et al., arXiv 2208.01618, for textual inversion). As released: 25 pictures, AdamW at 5e-3 times the batch of 16,
5,000 steps, from the embedding of a common word. The attacker feeds an embedding, which is more than a user of a
prompt can. The word is learnt once for all prompts, by the first process, and kept in the output folder, also on the
way.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from sfumato import storage
from sfumato.attacks.attack import Answer, Batch, Round, Setting, finite_gradient, moments_of, restore_moments
from sfumato.attacks.slots import Slots
from sfumato.progress import Track
from sfumato.randomness import generator_for, permuted_indices, randint_for, randn_for
from sfumato.settings import check_ranges, check_types
from sfumato.trainer import process_group

__all__ = ["WORD_FILE", "ConceptInversionConfig", "attack", "prepare", "slots_of"]

PICTURE_STREAM, NOISE_STREAM, LEVEL_STREAM = 741, 742, 743  # keys that keep the random streams apart
WORD_FILE = "word.safetensors"
KEEP_EVERY = 250
"""Steps after which the word is stored on the way."""


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
    slots = slots_of(batch.setting, batch.tokens, batch.counts)
    rows = tuple(range(len(batch.prompts)))
    with torch.no_grad():
        told = batch.encode(rows, slots, word.expand(len(rows), 1, -1))
    yield Round(rows, conditioning=told, iterations=config.steps)


@torch.no_grad()
def prepare(setting: Setting, config: ConceptInversionConfig) -> None:
    """Let one process learn the word for all."""
    group = process_group()
    word = (
        setting.once("word", lambda: learn_word(setting, config)) if group is None or group.is_main_process else None
    )
    if group is not None:
        told = broadcast_object_list([None if word is None else word.cpu()])
        setting.once("word", lambda: told[0].to(setting.victim.device))


def slots_of(setting: Setting, tokens: torch.Tensor, counts: torch.Tensor) -> Slots:
    """Put the placeholder where prompts name the concept, or behind them; see `Slots.instead`."""
    return Slots.instead(tokens, counts, _phrases(setting))


def learn_word(setting: Setting, config: ConceptInversionConfig) -> torch.Tensor:
    """Learn the placeholder's embedding, ``(1, 1, width)``; what an earlier start stored in the folder is taken up."""
    victim, source = setting.victim, setting.source
    numbers, _ = victim.tokenize([config.start])
    word = victim.embed_tokens(numbers)[:, 1:2].clone().requires_grad_()
    adam = torch.optim.AdamW([word], lr=config.learning_rate, weight_decay=config.weight_decay)
    file, key = None if setting.folder is None else setting.folder / WORD_FILE, _key(setting, config)
    taken = _restored(file, key, word, adam)
    if taken == config.steps:
        return word.detach()
    asked = [setting.concept.prompts[k % len(setting.concept.prompts)] for k in range(config.pictures)]
    drawn = source.generate(
        asked, [generator_for(setting.seed, PICTURE_STREAM, k) for k in range(len(asked))],
        num_inference_steps=setting.num_inference_steps, guidance_scale=setting.guidance_scale,
    )  # fmt: skip
    latents = victim.encode_images(drawn.to(victim.device))[0].float()
    tokens, counts = victim.tokenize(asked)
    slots = slots_of(setting, tokens, counts)
    for step in Track(range(taken, config.steps), "learn the word", shown=False):
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
            word.grad = finite_gradient(loss, word)
        adam.step()
        if file is not None and ((step + 1) % KEEP_EVERY == 0 or step + 1 == config.steps):
            storage.save_tensors(file, {"word": word, **moments_of(adam, word)}, {"key": key, "step": step + 1})
    return word.detach()


def _key(setting: Setting, config: ConceptInversionConfig) -> dict[str, Any]:
    """What the word depends on."""
    drawing = {"num_inference_steps": setting.num_inference_steps, "guidance_scale": setting.guidance_scale}
    concept = {"prompts": setting.concept.prompts, "phrases": setting.concept.phrases}
    facts = {**asdict(config), **concept, **drawing, "seed": setting.seed, **setting.facts}
    return dict(json.loads(json.dumps(facts, default=str)))


def _restored(file: Path | None, key: Mapping[str, Any], word: torch.Tensor, adam: torch.optim.AdamW) -> int:
    """Take the word, and what AdamW knows, from an earlier start; gives the steps that it took."""
    stored = storage.load_tensors_of(file, key)
    if file is None or stored is None:
        return 0
    word.data.copy_(stored["word"])
    step = int(storage.read_metadata(file)["step"])
    restore_moments(adam, word, stored, step)
    return step


def _phrases(setting: Setting) -> list[list[int]]:
    """The tokens of what names the concept: the longest names first."""
    tokens, counts = setting.victim.tokenize(list(dict.fromkeys((*setting.concept.names, *setting.concept.phrases))))
    numbers = tokens if tokens.ndim == 2 else tokens[..., 0]
    phrases = [row[1 : 1 + count] for row, count in zip(numbers.tolist(), counts.tolist(), strict=True) if count]
    return sorted(phrases, key=len, reverse=True)
