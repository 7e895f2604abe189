r"""Ring-A-Bell: prompts whose encoding lies where the concept's direction leads, found without the diffusion model.

With pairs of prompts with and without the concept, and the text encoder E that everybody has,

.. math::
    v = \frac{1}{N} \sum_i E(p_i^+) - E(p_i^-), \qquad
    \min_{P^*} \|E(P^*) - (E(P) + \eta v)\|^2

over K tokens, by a genetic search: the better half of a population are parents, children cross them at one point and
have one token changed at random.

Tsai et al., "Ring-A-Bell! How Reliable are Concept Removal Methods for Diffusion Models?", ICLR 2024, arXiv
2310.10012; eta is 3 for nudity and about 5 for violence there, K 16, 38 or 77. The paper has about 30 pairs of prompts
that differ in the concept alone; name a file of yours (`pairs`). Deviation: without one the pairs are the concept's
own prompts and what they are anchored to. With a vocabulary these are such pairs; for other models they are six common
wordings and the empty prompt, so that the direction is also that of the wordings. It is a black-box attack: only the
candidate of the last generation is drawn.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch

from sfumato.attacks.attack import Answer, Batch, Round, Setting, refuse_nan
from sfumato.attacks.prompts import read_pairs
from sfumato.attacks.slots import Slots, text_of
from sfumato.families import StableDiffusion
from sfumato.randomness import rng_for
from sfumato.settings import check_ranges, check_types

__all__ = ["RingABellConfig", "attack"]

SEARCH_STREAM = 731
KEEP_EVERY = 100
"""Generations after which the population is stored on the way."""


@dataclass
class RingABellConfig:
    """How Ring-A-Bell searches.

    Attributes:
        tokens: K, the length of the prompt that is looked for.
        strength: eta, how far along the concept's direction.
        population: Candidates of a generation.
        generations: How many.
        crossover: Probability that a child has two parents.
        mutation: Probability that one of its tokens is changed.
        encoder_batch_size: Candidates encoded at a time.
        pairs: A file of prompts with the concept and the same without it, .csv or .jsonl with ``with`` and
            ``without``; by default the concept's own prompts and what they are anchored to.
    """

    tokens: int = 16
    strength: float = 3.0
    population: int = 200
    generations: int = 3000
    crossover: float = 0.5
    mutation: float = 0.25
    encoder_batch_size: int = 2048
    pairs: str | None = None

    def __post_init__(self) -> None:
        """Check the types and ranges."""
        check_types(self)
        check_ranges(self, {"tokens": 1, "population": 4, "generations": 1, "encoder_batch_size": 1})
        for name in ("crossover", "mutation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}.")


def attack(batch: Batch, config: RingABellConfig) -> Generator[Round, Answer, None]:
    """Attack a batch; see `sfumato.attacks.attack`."""
    setting = batch.setting
    source, rows = setting.source, tuple(range(len(batch.prompts)))
    direction = setting.once("direction", lambda: concept_direction(source, setting, config.pairs))
    wanted = _encode(source, batch.tokens) + config.strength * direction  # (B, T, width)
    empty, none = source.tokenize([""])
    slot = Slots.placed(empty, none, config.tokens, "replace")
    allowed = np.array(source.ordinary_tokens)
    random = [rng_for(*key) for key in batch.keys(rows, SEARCH_STREAM)]
    people = np.stack([allowed[one.integers(len(allowed), size=(config.population, config.tokens))] for one in random])
    done = 0
    if (kept := batch.memory.kept()) is not None:
        people, done = kept[0]["people"].numpy(), kept[1]["done"]
        for one, state in zip(random, kept[1]["random"], strict=True):
            one.bit_generator.state = state
    for generation in range(done, config.generations):
        if generation > done and generation % KEEP_EVERY == 0:
            states = [one.bit_generator.state for one in random]
            batch.memory.keep({"people": torch.from_numpy(people)}, done=generation, random=states)
        costs = _costs(source, slot, empty, people, wanted, config.encoder_batch_size)  # (B, population)
        people = np.stack([_next(people[k], costs[k], allowed, random[k], config) for k in rows])
    costs = _costs(source, slot, empty, people, wanted, config.encoder_batch_size)
    found = torch.from_numpy(people[np.arange(len(rows)), costs.argmin(1)]).to(empty.device)  # (B, K)
    spelled = text_of(source, _repeated(slot, len(rows)), empty.expand(len(rows), *empty.shape[1:]), found)
    yield Round(rows, tuple(spelled), iterations=config.generations)


def concept_direction(source: StableDiffusion, setting: Setting, pairs: str | None = None) -> torch.Tensor:
    """Average what tells prompts with the concept from those without, ``(1, T, width)``."""
    concept = setting.concept
    with_it, without = (concept.prompts, concept.anchors) if pairs is None else zip(*read_pairs(pairs), strict=True)
    encoded = [source.encode_prompts(prompts)["encoder_hidden_states"].float() for prompts in (with_it, without)]
    return (encoded[0] - encoded[1]).mean(0, keepdim=True)


@torch.no_grad()
def _encode(source: StableDiffusion, tokens: torch.Tensor) -> torch.Tensor:
    encoder = source.parts["text_encoder"]
    return source.encode_embeddings(encoder, tokens, source.embed_tokens(tokens))["encoder_hidden_states"].float()


def _repeated(slots: Slots, count: int) -> Slots:
    return slots.rows([0] * count)


def _costs(
    source: StableDiffusion, slot: Slots, empty: torch.Tensor, people: np.ndarray, wanted: torch.Tensor, size: int
) -> np.ndarray:
    """The squared distance of every candidate ``(B, population, K)`` from what is wanted, ``(B, population)``."""
    flat = torch.from_numpy(people.reshape(-1, people.shape[2])).to(empty.device)
    costs = []
    for start in range(0, len(flat), size):
        some = flat[start : start + size]
        new = some if empty.ndim == 2 else some[..., None].expand(-1, -1, empty.shape[2])
        told = _repeated(slot, len(some)).fill(empty.expand(len(some), *empty.shape[1:]), new)
        aims = wanted[torch.arange(start, start + len(some), device=wanted.device) // people.shape[1]]
        costs.append((_encode(source, told) - aims).square().flatten(1).sum(1))
        refuse_nan(costs[-1])
    return torch.cat(costs).view(people.shape[:2]).cpu().numpy()


def _next(
    people: np.ndarray, costs: np.ndarray, allowed: np.ndarray, random: np.random.Generator, config: RingABellConfig
) -> np.ndarray:
    """The next generation of one prompt: the better half, and as many children of it."""
    parents = people[costs.argsort(kind="stable")[: len(people) // 2]]
    count, length = len(people) - len(parents), people.shape[1]
    first, second = parents[random.integers(len(parents), size=(2, count))]
    cut = random.integers(1, length, size=count) if length > 1 else np.ones(count, int)
    crossed = (random.random(count) < config.crossover)[:, None] & (np.arange(length) >= cut[:, None])
    children = np.where(crossed, second, first)
    changed = random.random(count) < config.mutation
    where, what = random.integers(length, size=count), allowed[random.integers(len(allowed), size=count)]
    children[changed, where[changed]] = what[changed]
    return np.concatenate([parents, children])
