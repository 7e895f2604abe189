r"""AdvUnlearn: erase a concept from prompts that an adversary is free to extend.

Each step first attacks the model, to make it say what the original says of the concept c, then erases under the attack
found, as ESD does, and holds on to retained prompts r:

.. math::
    \delta^* = \arg\min_\delta \|\epsilon(z_t, t \mid E_\theta(c \oplus \delta)) - \epsilon^*(z_t, t, c)\|^2 ,

.. math::
    L = \|\epsilon(z_t, t \mid E_\theta(c \oplus \delta^*)) - T\|^2
        + \gamma\, \|\epsilon(z^r_t, t \mid E_\theta(r)) - \epsilon^*(z^r_t, t, r)\|^2 , \qquad
    T = \epsilon^*(z_t, t, \varnothing) - \eta\,[\epsilon^*(z_t, t, c) - \epsilon^*(z_t, t, \varnothing)] ,

with E_theta the text encoder, which is trained (``train="text_encoder"``), or the denoiser trained in its place
(``train="denoiser"``). delta is the embeddings of k tokens (see `sfumato.unlearning.embedding_attack`), and gamma is
``retain_weight``. With ``direction="name"`` T leaves alone what else a prompt says, see
`sfumato.unlearning.trajectories.erasing_target`. With ``retention="iter"`` steps take turns: one erases, the next
``retain_steps`` retain. The first ``warmup_rounds`` rounds are without an attack.

The states z_t come from the original model if the text encoder is trained, and with them all targets: both are walked
once (`sfumato.unlearning.trajectories`), which changes no term of the objective. If the denoiser is trained, it walks,
every ``refresh_every`` steps (1 is as released), those trajectories that the steps to come will use.

Zhang, Chen, Jia, Zhang, Fan, Liu, Hong, Ding, Liu, "Defensive Unlearning with Adversarial Training for Robust Concept
Erasure in Diffusion Models", NeurIPS 2024, arXiv 2405.15234. Where this differs from the released code: an attack
never displaces the concept's own tokens, because they are counted as the tokenizer does (``legacy_word_count`` counts
words); states have the times they were walked to (``legacy_level_mismatch``); every state of a step has a time of its
own (``legacy_shared_time``); with ``"iter"`` gamma weighs the steps that retain (``legacy_unweighted_turns``);
``attack_start="latest"`` starts from the embeddings last found, wherever they stand in the prompt (there from those
behind the start token); the whole text encoder is trained, not chosen layers of it; DDIM walks; no gradient is
computed for weights that are not trained; batches may have any size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sfumato.families import StableDiffusion
from sfumato.randomness import randint_for, rng_for
from sfumato.trainer import Shard
from sfumato.unlearning.embedding_attack import (
    INSERTIONS,
    find_embeddings,
    frozen,
    insert_embeddings,
    insert_words,
    random_embeddings,
    room_for,
)
from sfumato.unlearning.task import History, Task
from sfumato.unlearning.trajectories import (
    Bank,
    TrainedTrajectories,
    TrajectoryConfig,
    Walker,
    bank_facts,
    erasing_target,
    find_trajectories,
    shuffled_states,
)

__all__ = ["AdvUnlearnConfig", "AdvUnlearnObjective", "check", "run"]

# keys that keep the random streams apart
FORGET_BANK, RETAIN_BANK, RETAIN_PROMPTS, FORGET_STREAM, RETAIN_STREAM = 211, 212, 213, 214, 215
ATTACK_STREAM, START_STREAM, REFRESH_STREAM, LEVEL_STREAM = 216, 217, 218, 219


@dataclass
class AdvUnlearnConfig(TrajectoryConfig):
    """AdvUnlearn's hyper-parameters; the defaults are those of the authors' run for nudity in Stable Diffusion 1.4.

    Attributes:
        train: What to train, ``"text_encoder"`` or ``"denoiser"``.
        eta: How far to guide away from the concept.
        retention: ``"reg"``: erase and retain in one step; ``"iter"``: in turns.
        retain_weight: gamma.
        retain_steps: Steps that retain after each one that erases; of ``"iter"`` only.
        retain_batch_size: Retained states in a step, over all processes.
        retain_trajectories: Trajectories of retained prompts, one for each as far as they go.
        warmup_rounds: Steps that erase before the attacks begin.
        attack: ``"released"`` or ``"projected"``; see `sfumato.unlearning.embedding_attack`.
        fast_attack: Attack along signs.
        attack_steps: Steps of an attack.
        attack_learning_rate: Of Adam, or the length of a projected step.
        attack_radius: The largest norm of an embedding in a projected attack; None is that of the vocabulary.
        attack_start: ``"random"``: from the embeddings of random tokens (with ``"add"`` from 0); ``"latest"``: from
            the last attack.
        attack_tokens: k; ``"add"`` has as many as the concept.
        insertion: ``"prefix"``, ``"suffix"``, ``"replace"`` or ``"add"``.
        legacy_word_count: Take a prompt to have as many tokens as words, as released: if it has more, an attack before
            or behind it displaces some.
        legacy_shared_time: Draw one time for all states of a step, erased and retained, as released.
        legacy_unweighted_turns: With ``"iter"``, let retaining steps have weight 1 whatever gamma is, as released.
    """

    batch_size: int = 1
    train: str = field(default="text_encoder", metadata={"choices": ["text_encoder", "denoiser"]})
    eta: float = 1.0
    retention: str = field(default="reg", metadata={"choices": ["reg", "iter"]})
    retain_weight: float = 0.3
    retain_steps: int = 1
    retain_batch_size: int = 5
    retain_trajectories: int = 64
    warmup_rounds: int = 200
    attack: str = field(default="released", metadata={"choices": ["released", "projected"]})
    fast_attack: bool = False
    attack_steps: int = 30
    attack_learning_rate: float = 1e-3
    attack_radius: float | None = None
    attack_start: str = field(default="random", metadata={"choices": ["random", "latest"]})
    attack_tokens: int = 1
    insertion: str = field(default="prefix", metadata={"choices": list(INSERTIONS)})
    legacy_word_count: bool = False
    legacy_shared_time: bool = False
    legacy_unweighted_turns: bool = False

    def __post_init__(self) -> None:
        """Check the types and ranges."""
        super().__post_init__()
        for name in ("retain_steps", "retain_batch_size", "retain_trajectories", "attack_steps", "attack_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.eta < -1:
            raise ValueError(f"`eta` must not train towards the concept: it must be at least -1, got {self.eta:g}.")
        for name in ("retain_weight", "warmup_rounds"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        for name in ("attack_learning_rate", "attack_radius"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")

    @property
    def part(self) -> str:
        """The part of the model that changes."""
        return self.train

    @property
    def period(self) -> int:
        """Steps in a round: one that erases, and those that only retain."""
        return 1 + self.retain_steps if self.retention == "iter" else 1


class AdvUnlearnObjective:
    """The erasing and retaining terms, and the attack between the steps; see the module's docstring.

    Args:
        task: Model, family, training.
        config: Hyper-parameters.
        forget: Trajectories of the concept's prompts, equally many for each.
        retain: Trajectories of retained prompts.
    """

    def __init__(self, task: Task, config: AdvUnlearnConfig, forget: Bank, retain: Bank) -> None:
        assert isinstance(task.family, StableDiffusion)  # of which sfumato.unlearning.core has made sure
        self.family, self.config, self.accelerator = task.family, config, task.accelerator
        self.model, self.seed, self.steps = task.model, task.seed, task.training.steps
        self.forget, self.retain = forget, retain
        self.batch_size = config.batch_size
        self.table = self.family.token_table
        prompts = list(dict.fromkeys([*forget.prompts, *retain.prompts]))
        tokens, counts = self.family.tokenize(prompts)
        if config.legacy_word_count:
            counts = torch.tensor([len(prompt.split()) for prompt in prompts], device=counts.device)
        self._tokens = dict(zip(prompts, tokens, strict=True))
        self._counts = dict(zip(prompts, counts, strict=True))
        self._rows = {p: [row for row, other in enumerate(forget.prompts) if other == p] for p in forget.prompts}
        added = max(int(self._counts[prompt]) for prompt in forget.prompts)
        width = added if config.insertion == "add" else config.attack_tokens
        self.delta = torch.zeros(config.batch_size, width, self.table.shape[1])
        """The attack that the next erasing step defends against, ``(B, k, width)``, on the CPU."""
        self.attacks = torch.zeros((), dtype=torch.int64)

    def losses(self, model: torch.nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """Give the terms ``forget`` and ``retain``; all states share one forward pass."""
        config, turn = self.config, step % self.config.period
        parts = []
        if turn == 0:
            parts.append(self._erasing(step, shard.of(self.batch_size)))
        if config.retention == "reg" or turn > 0:
            parts.append(self._retaining(step, shard))
        latents, times, targets, tokens, embeddings = (torch.cat(column) for column in zip(*parts, strict=True))
        student = self._predict(model, latents, times, tokens, embeddings)
        errors = (student - targets).square().flatten(1).mean(1)  # (B + R,)
        forgotten = len(parts[0][0]) if turn == 0 else 0
        weight = 1.0 if config.retention == "iter" and config.legacy_unweighted_turns else config.retain_weight
        none = errors.new_zeros(())
        return {
            "forget": errors[:forgotten].mean() if forgotten else none,
            "retain": weight * errors[forgotten:].mean() if forgotten < len(errors) else none,
        }

    def _erasing(self, step: int, positions: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Latents, times, targets, tokens and embeddings of a step's states of the concept, under the attack."""
        round_ = step // self.config.period
        rows, levels = self._forget_states(round_, positions)
        away = "prompt" if self.config.direction == "prompt" else "source"
        noises = list(dict.fromkeys(("empty", "prompt", away)))
        states = self.forget.at(rows, self._shared(levels, step), noises)
        target = erasing_target(states.said, "prompt", away, self.config.eta)
        delta = self.delta[list(positions)] if round_ >= self.config.warmup_rounds else None
        return states.latents, states.timesteps, target, *self._embed(states.prompts, delta)

    def _retaining(self, step: int, shard: Shard) -> tuple[torch.Tensor, ...]:
        """The same of a step's retained states."""
        rows, levels = self._retain_states(step, shard)
        states = self.retain.at(rows, self._shared(levels, step), ("prompt",))
        return states.latents, states.timesteps, states.said["prompt"], *self._embed(states.prompts, None)

    def after_step(self, model: torch.nn.Module, step: int, shards: Sequence[Shard]) -> None:
        """Walk anew, if the denoiser is trained, and find the attack for the next step, on its weights."""
        if step + 1 < self.steps:
            self.prepare(step + 1, [position for shard in shards for position in shard.of(self.batch_size)])

    def prepare(self, step: int, positions: Sequence[int]) -> None:
        """Do what must precede a step: `positions` are those of its batch that this process attacks."""
        every = self.config.refresh_every
        if isinstance(self.forget, TrainedTrajectories) and step > 0 and step % every == 0:
            self._refresh(range(step, min(step + every, self.steps)))
        if not self._attacked(step):
            return
        found = torch.zeros_like(self.delta, device=self.family.device)
        found[list(positions)] = self._attack(step // self.config.period, list(positions))
        self.delta.copy_(self.accelerator.reduce(found, "sum"))  # each process has filled in its own rows
        self.attacks += 1

    def state(self) -> Mapping[str, torch.Tensor]:
        """Give the last attack, how many there were, and the trajectories if they change."""
        walked = {
            f"{name}.{key}": value
            for name, bank in (("forget", self.forget), ("retain", self.retain))
            if isinstance(bank, TrainedTrajectories)
            for key, value in bank.state().items()
        }
        return {"delta": self.delta, "attacks": self.attacks, **walked}

    def _attacked(self, step: int) -> bool:
        """Whether a step defends against an attack."""
        round_, turn = divmod(step, self.config.period)
        return turn == 0 and round_ >= self.config.warmup_rounds

    def _attack(self, round_: int, positions: list[int]) -> torch.Tensor:
        """Find the attack on some positions of a round's batch, ``(len(positions), k, width)``."""
        config, rows = self.config, self._forget_states(round_, positions)[0]
        prompts = [self.forget.prompts[row] for row in rows]

        def losses(delta: torch.Tensor, number: int) -> torch.Tensor:
            states = self.forget.at(*self._attack_states(round_, number, positions, prompts), ("prompt",))
            with self.accelerator.autocast():
                said = self._predict(self.model, states.latents, states.timesteps, *self._embed(prompts, delta))
            return (said - states.said["prompt"]).square().flatten(1).mean(1)

        return find_embeddings(
            losses, self._start(round_, positions), self.table, attack=config.attack, steps=config.attack_steps,
            learning_rate=config.attack_learning_rate, radius=config.attack_radius, fast=config.fast_attack,
        )  # fmt: skip

    def _start(self, round_: int, positions: list[int]) -> torch.Tensor:
        """Where an attack starts, ``(len(positions), k, width)``."""
        if self.config.attack_start == "latest" and self.attacks > 0:
            return self.delta[positions].to(self.family.device)
        if self.config.insertion == "add":
            return torch.zeros_like(self.delta[positions], device=self.family.device)
        count = self.delta.shape[1]
        keys = [(self.seed, START_STREAM, round_, position, k) for position in positions for k in range(count)]
        return random_embeddings(self.table, keys, count)

    def _embed(self, prompts: Sequence[str], delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens ``(B, T)`` of prompts and their embeddings ``(B, T, width)``, with an attack if there is one."""
        tokens = torch.stack([self._tokens[prompt] for prompt in prompts])
        embeddings = self.family.embed_tokens(tokens)
        if delta is None:
            return tokens, embeddings
        counts = torch.stack([self._counts[prompt] for prompt in prompts])
        legacy, insertion = self.config.legacy_word_count, self.config.insertion
        numbers = tokens
        if not legacy:  # which drops end tokens, so that the numbers say where they were
            numbers = insert_words(tokens, delta.shape[1], self.family.plain_token, counts, insertion)
        return numbers, insert_embeddings(embeddings, delta.to(embeddings), counts, insertion, drop_end=legacy)

    def _predict(
        self, model: torch.nn.Module, latents: torch.Tensor, times: torch.Tensor, tokens: torch.Tensor,
        embeddings: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The noise that the model sees, whichever of its parts is `model`."""
        parts = {**self.family.parts, self.config.train: model}
        conditioning = self.family.encode_embeddings(parts["text_encoder"], tokens, embeddings)
        return self.family.ask(parts["denoiser"], latents, times, conditioning)

    def _forget_states(self, round_: int, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Rows and levels of positions of a round's batch."""
        seed, start = self.seed + FORGET_STREAM, round_ * self.batch_size
        rows, levels = shuffled_states(self.forget, seed, start, self.batch_size)
        return rows[list(positions)], levels[list(positions)]

    def _retain_states(self, step: int, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
        span = shard.of(self.config.retain_batch_size)
        start = step * self.config.retain_batch_size + span.start
        return shuffled_states(self.retain, self.seed + RETAIN_STREAM, start, len(span))

    def _shared(self, levels: np.ndarray, step: int) -> np.ndarray:
        """One level in the place of all, if the states of a step are to share their time."""
        if not self.config.legacy_shared_time:
            return levels
        return np.full_like(levels, int(randint_for([(self.seed, LEVEL_STREAM, step)], self.forget.levels)))

    def _attack_states(
        self, round_: int, number: int, positions: Sequence[int], prompts: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows, of the prompt attacked, and levels for a step of the attacks on some positions."""
        keys = [(self.seed, ATTACK_STREAM, round_, number, position) for position in positions]
        choices = [self._rows[prompt] for prompt in prompts]
        picks = [int(randint_for([(*key, 0)], len(rows))) for key, rows in zip(keys, choices, strict=True)]
        rows = np.array([rows[pick] for rows, pick in zip(choices, picks, strict=True)])
        return rows, randint_for([(*key, 1) for key in keys], self.forget.levels).numpy()

    def _refresh(self, steps: range) -> None:
        """Let the denoiser walk anew what some steps and their attacks will use."""
        assert isinstance(self.forget, TrainedTrajectories) and isinstance(self.retain, TrainedTrajectories)
        forgets, retains = list[np.ndarray](), list[np.ndarray]()
        everyone = range(self.batch_size)
        for step in steps:
            round_, turn = divmod(step, self.config.period)
            if turn == 0:
                forgets.append(self._forget_states(round_, everyone)[0])
            if self.config.retention == "reg" or turn > 0:
                retains.append(self._retain_states(step, Shard(0, 1))[0])
            if self._attacked(step):
                prompts = [self.forget.prompts[row] for row in forgets[-1]]
                forgets += [
                    self._attack_states(round_, number, everyone, prompts)[0]
                    for number in range(self.config.attack_steps)
                ]
        for number, (bank, rows) in enumerate(((self.forget, forgets), (self.retain, retains))):
            if rows:
                key = (self.seed, REFRESH_STREAM, number, steps.start)
                bank.refresh(np.concatenate(rows), key)


def check(task: Task, config: AdvUnlearnConfig) -> None:
    """Check, before the long work, that the retained batch can be shared and that the attack fits into the prompts."""
    shards = task.accelerator.num_processes * task.training.gradient_accumulation_steps
    if config.retain_batch_size % shards:
        raise ValueError(
            f"`retain_batch_size`={config.retain_batch_size} can't be shared equally by "
            f"{task.accelerator.num_processes} processes x {task.training.gradient_accumulation_steps} accumulation "
            f"steps; use a multiple of {shards}."
        )
    assert isinstance(task.family, StableDiffusion)
    tokens, counts = task.family.tokenize(task.concept.prompts)
    longest, length = int(counts.max()), tokens.shape[1]
    if not room_for(length, longest, config.attack_tokens, config.insertion):
        prompt = task.concept.prompts[int(counts.argmax())]
        raise ValueError(
            f"`attack_tokens`={config.attack_tokens} leaves no room in the text encoder's {length} tokens, of which "
            f"{prompt!r} takes {longest} and the ends 2; use fewer."
        )


@contextmanager
def checkpointed(denoiser: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """Let a denoiser recompute its activations, if `wanted`: gradients pass through it, whoever is trained."""
    wanted = wanted and hasattr(denoiser, "enable_gradient_checkpointing")
    if wanted:
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    try:
        yield
    finally:
        if wanted:
            denoiser.disable_gradient_checkpointing()  # type: ignore[operator]


def run(task: Task, config: AdvUnlearnConfig) -> tuple[History, dict[str, Any]]:
    """Walk the trajectories, then attack and defend in turns; see `sfumato.unlearning.task`."""
    order = rng_for(task.seed, RETAIN_PROMPTS).permutation(len(task.concept.retain))
    kept = [task.concept.retain[order[k % len(order)]] for k in range(config.retain_trajectories)]
    names = config.names(task.concept)
    prompts = task.prompts(task.concept.prompts, kept, [""], list((names or {}).values()))
    walkers = [
        Walker(task.family, prompts, config, task.accelerator, source, config.legacy_shared_time)
        for source in (names, None)
    ]
    erased = task.concept.prompts * config.trajectories_per_prompt
    walked = [
        find_trajectories(task, walkers[0], erased, "forget-trajectories", FORGET_BANK),
        find_trajectories(task, walkers[1], kept, "retain-trajectories", RETAIN_BANK),
    ]
    live = config.train == "denoiser"
    forget, retain = (
        TrainedTrajectories(walker, task.model, bank) if live else bank
        for walker, bank in zip(walkers, walked, strict=True)
    )
    with (
        frozen(task.family.denoiser, task.family.parts["text_encoder"]),
        checkpointed(task.family.denoiser, task.training.gradient_checkpointing),
    ):
        objective = AdvUnlearnObjective(task, config, forget, retain)
        passes, count = task.training.gradient_accumulation_steps, task.accelerator.num_processes
        shards = [Shard(number * count + task.accelerator.process_index, passes * count) for number in range(passes)]
        objective.prepare(0, [position for shard in shards for position in shard.of(config.batch_size)])
        history = task.train(objective, "advunlearn")
    return history, {**bank_facts(*zip(walkers, walked, strict=True)), "attacks": int(objective.attacks)}
