r"""Adversarial embeddings: the attack that AdvUnlearn trains against, turned on any unlearned model.

The original model theta* walks to states z_t of each prompt c; the attack looks for k token embeddings with which the
unlearned model theta says of them what the original says of the concept,

.. math::
    \delta^* = \arg\min_\delta E_t\,
        \|\epsilon_\theta(z_t, t \mid E_\theta(c \oplus \delta)) - \epsilon^*(z_t, t, c)\|^2 ,

and the picture that the unlearned model draws of the attacked prompt tells whether the concept came back. Each prompt
is attacked by itself, whatever the batch. This is an attacker who has the original, the result, and may feed
embeddings, which is more than a user of a prompt has.

Zhang et al., "Defensive Unlearning with Adversarial Training", NeurIPS 2024, arXiv 2405.15234, section 4; how the
embeddings go into a prompt and how they descend is in `sfumato.unlearning.embedding_attack`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from sfumato.attacks.attack import Answer, Batch, Round, refuse_nan
from sfumato.families import Conditioning, Family, StableDiffusion, family_of
from sfumato.progress import are_hidden
from sfumato.randomness import randint_for
from sfumato.settings import check_ranges, check_seed, check_types
from sfumato.unlearning.embedding_attack import (
    INSERTIONS,
    find_embeddings,
    frozen,
    insert_embeddings,
    insert_words,
    random_embeddings,
    room_for,
)
from sfumato.unlearning.examples import PromptTable
from sfumato.unlearning.trajectories import Trajectories, TrajectoryConfig, Walker

__all__ = ["EmbeddingAttackConfig", "attack", "attack_embeddings"]

WALK_STREAM, START_STREAM, LEVEL_STREAM = 701, 702, 703  # keys that keep the random streams apart


@dataclass
class EmbeddingAttackConfig:
    """How to attack.

    Attributes:
        tokens: k, embeddings added to a prompt (``"add"``: to its own tokens, as many as it has).
        insertion: ``"prefix"``, ``"suffix"``, ``"replace"`` or ``"add"``.
        attack: ``"projected"`` descent, or ``"released"``: Adam along the running sum of the gradients.
        steps: Steps of the descent.
        learning_rate: Length of a projected step as a share of the radius, or Adam's rate.
        radius: The largest norm of an embedding in a projected attack; None is that of the vocabulary.
        levels: Levels of a trajectory; every step of the attack takes one of them.
        guidance: Guidance scale of the trajectories.
        batch_size: Prompts attacked at a time.
    """

    tokens: int = 1
    insertion: str = field(default="prefix", metadata={"choices": list(INSERTIONS)})
    attack: str = field(default="projected", metadata={"choices": ["projected", "released"]})
    steps: int = 40
    learning_rate: float = 0.1
    radius: float | None = None
    levels: int = 20
    guidance: float = 3.0
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Check the types and ranges."""
        check_types(self)
        least = {"tokens": 1, "steps": 1, "levels": 2, "batch_size": 1}
        check_ranges(self, least, positive=("learning_rate", "radius"))


def attack_embeddings(
    unlearned: DiffusionPipeline,
    original: DiffusionPipeline,
    prompts: Sequence[str],
    config: EmbeddingAttackConfig | None = None,
    *,
    seed: int = 0,
    description: str | None = "attack",
) -> Conditioning:
    """Find embeddings that bring a concept back.

    Args:
        unlearned: The model to attack; it is not changed.
        original: The model as it was.
        prompts: ``N`` prompts that ask for the concept; one may come several times, to be attacked from other noise.
        config: How.
        seed: Seeds the trajectories, the start of each attack and the levels it descends at.
        description: The progress bar's label; None shows no bar.

    Returns:
        The attacked prompts, encoded: what `sfumato.evaluation.generation.draw` takes as `conditioning`, ``N`` rows.

    Raises:
        ValueError: If there is no prompt, or no room in one for the embeddings.
    """
    config = config or EmbeddingAttackConfig()
    check_seed(seed)
    victim, source = family_of(unlearned), family_of(original)
    if not isinstance(victim, StableDiffusion):
        raise ValueError(
            f"Embeddings are put before CLIP, as Stable Diffusion 1, 2 and XL have it; not {victim.label}."
        )
    if not prompts:
        raise ValueError("`prompts` is empty; name at least one prompt that asks for the concept.")
    tokens, counts = victim.tokenize(prompts)
    longest = int(counts.argmax())
    if not room_for(tokens.shape[1], int(counts[longest]), config.tokens, config.insertion):
        raise ValueError(f"There is no room for {config.tokens} embeddings in {prompts[longest]!r}; use fewer.")
    walker = _walker(source, prompts, config)
    found = []
    parts = range(0, len(prompts), config.batch_size)
    with frozen(*victim.parts.values()):
        for start in tqdm(parts, desc=description, disable=description is None or are_hidden()):
            numbers = range(start, min(start + config.batch_size, len(prompts)))
            states = _states(walker, [prompts[k] for k in numbers], numbers, seed)
            found.append(_attack(victim, states, tokens[list(numbers)], counts[list(numbers)], numbers, config, seed))
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def attack(batch: Batch, config: EmbeddingAttackConfig) -> Generator[Round, Answer, None]:
    """Attack a batch; see `sfumato.attacks.attack`."""
    setting = batch.setting
    states = _states(_walker(setting.source, batch.prompts, config), batch.prompts, batch.numbers, setting.seed)
    found = _attack(setting.victim, states, batch.tokens, batch.counts, batch.numbers, config, setting.seed)
    yield Round(tuple(range(len(batch.prompts))), conditioning=found, iterations=config.steps)


def _walker(source: Family, prompts: Sequence[str], config: EmbeddingAttackConfig) -> Walker:
    # each process attacks its own prompts
    alone: Any = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True, autocast=nullcontext)
    walking = TrajectoryConfig(
        trajectory_steps=config.levels, trajectory_guidance=config.guidance, trajectory_batch_size=config.batch_size
    )
    return Walker(source, PromptTable(source, [*prompts, ""]), walking, alone)


def _states(walker: Walker, prompts: Sequence[str], numbers: Sequence[int], seed: int) -> Trajectories:
    """Let the original walk to states of prompts, and say what it makes of them."""
    return walker.walk(walker.family.denoiser, prompts, [(seed, WALK_STREAM, k) for k in numbers], teach=True)


def _attack(
    victim: StableDiffusion, states: Trajectories, tokens: torch.Tensor, counts: torch.Tensor, numbers: Sequence[int],
    config: EmbeddingAttackConfig, seed: int,
) -> Conditioning:  # fmt: skip
    """Attack a batch of prompts, of which `numbers` are the positions among all."""
    table, encoder, rows = victim.token_table, victim.parts["text_encoder"], np.arange(len(numbers))
    plain = victim.embed_tokens(tokens)  # (B, T, width)

    def encoded(delta: torch.Tensor) -> Conditioning:
        numbers = insert_words(tokens, delta.shape[1], victim.plain_token, counts, config.insertion)
        return victim.encode_embeddings(encoder, numbers, insert_embeddings(plain, delta, counts, config.insertion))

    def losses(delta: torch.Tensor, number: int) -> torch.Tensor:
        levels = randint_for([(seed, LEVEL_STREAM, number, k) for k in numbers], states.levels).numpy()
        at = states.at(rows, levels, ("prompt",))
        said = victim.ask(victim.denoiser, at.latents, at.timesteps, encoded(delta))
        found = (said - at.said["prompt"]).square().flatten(1).mean(1)
        refuse_nan(found.detach())
        return found

    if config.insertion == "add":
        start = torch.zeros(len(numbers), int(counts.max()), table.shape[1], device=table.device)
    else:
        keys = [(seed, START_STREAM, k, place) for k in numbers for place in range(config.tokens)]
        start = random_embeddings(table, keys, config.tokens)
    radius = config.radius or float(table.norm(dim=1).max())
    delta = find_embeddings(
        losses, start, table, attack=config.attack, steps=config.steps, radius=radius,
        learning_rate=config.learning_rate * (radius if config.attack == "projected" else 1.0),
    )  # fmt: skip
    refuse_nan(delta)
    with torch.no_grad():
        return encoded(delta)
