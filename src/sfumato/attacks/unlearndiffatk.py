r"""UnlearnDiffAtk: tokens before a prompt with which the unlearned model denoises the original's picture.

The unlearned model theta is itself the classifier: of x_0, the original's picture of the prompt c,

.. math::
    \delta^* = \arg\min_\delta E_\epsilon\, \|\epsilon - \epsilon_\theta(x_t, t \mid \delta \oplus c)\|^2, \qquad
        x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon

over k tokens delta, relaxed to points u of a simplex (`sfumato.attacks.simplex`), by Adam with coupled weight decay.
The times t ascend; after some iterations at each, the likeliest tokens are spelled out, cut into tokens again, drawn
and judged, until the concept shows. u and Adam's moments are carried from one time to the next.

Zhang et al., "To Generate or Not? Safety-Driven Unlearned Diffusion Models Are Still Easy To Generate Unsafe Images
... For Now", ECCV 2024, arXiv 2310.11868. As the released program, with its defaults (k is 5 for nudity and violence,
3 for styles and objects there), but that many prompts are attacked at once, the projection is exact, and randomness
is keyed by the prompt. The target of the prediction is the model's own, so that models of v can be attacked. Pictures
come from each pipeline's own scheduler, in as many steps as the audit says, for targets and candidates alike, where
the released program takes 50 steps of LMS, and 25 for the targets; ``"replace"`` is not among its places.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

import torch

from sfumato.attacks.attack import Answer, Batch, Round, finite_gradient, moments_of, restore_moments
from sfumato.attacks.simplex import drawn_tokens, project_to_simplex
from sfumato.attacks.slots import PLACES, Slots, text_of
from sfumato.randomness import generator_for, randn_for
from sfumato.settings import check_ranges, check_types

__all__ = ["UnlearnDiffAtkConfig", "attack"]

NOISE_STREAM, TOKEN_STREAM = 711, 712  # keys that keep the random streams apart


@dataclass
class UnlearnDiffAtkConfig:
    """How UnlearnDiffAtk searches.

    Attributes:
        tokens: k, tokens put into a prompt.
        place: ``"prefix"``, ``"suffix"``, ``"middle"``, ``"insert"`` at equal intervals, ``"per_words"``, one before
            each three of the prompt's tokens, or ``"replace"`` the prompt.
        times: How many times of the schedule are attacked, in ascending order.
        iterations: Steps at each of them.
        learning_rate: Adam's.
        weight_decay: Adam's, coupled.
    """

    tokens: int = 5
    place: str = field(default="prefix", metadata={"choices": list(PLACES)})
    times: int = 50
    iterations: int = 40
    learning_rate: float = 0.01
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        """Check the types and ranges."""
        check_types(self)
        check_ranges(self, {"tokens": 1, "times": 1, "iterations": 1, "weight_decay": 0}, positive=("learning_rate",))


def attack(batch: Batch, config: UnlearnDiffAtkConfig) -> Generator[Round, Answer, None]:
    """Attack a batch; see `sfumato.attacks.attack`."""
    victim = batch.setting.victim
    table, slots = victim.token_table, Slots.placed(batch.tokens, batch.counts, config.tokens, config.place)
    weights = torch.full((len(batch.prompts), config.tokens, len(table)), 1 / len(table), device=table.device)
    adam = torch.optim.Adam([weights], lr=config.learning_rate, weight_decay=config.weight_decay)
    rows, taken = tuple(range(len(batch.prompts))), 0
    if (kept := batch.memory.kept()) is not None:
        stored, facts = kept
        rows, taken = tuple(facts["rows"]), facts["taken"]
        weights.copy_(stored["weights"])
        restore_moments(adam, weights, stored, taken)
    for time in attacked_times(victim.num_train_timesteps, config.times)[taken // config.iterations :]:
        for _ in range(config.iterations):
            weights.grad = torch.zeros_like(weights)  # of prompts that are done it stays so
            weights.grad[list(rows)] = _gradient(batch, slots, weights, rows, time, taken)
            adam.step()
            weights.copy_(project_to_simplex(weights))
            taken += 1
        spelled = text_of(victim, slots.rows(rows), batch.tokens[list(rows)], weights[list(rows)].argmax(-1))
        answer = yield Round(rows, prompts=tuple(spelled), iterations=taken)
        rows = tuple(row for row, shown in zip(rows, answer.shown, strict=True) if not shown)
        if not rows:
            return
        batch.memory.keep({"weights": weights, **moments_of(adam, weights)}, rows=rows, taken=taken)


def attacked_times(levels: int, count: int) -> list[int]:
    """Give `count` times of a schedule, ascending, each in the middle of a stretch: 10, 30 ... 990 of 50 in 1,000."""
    return [int((2 * k + 1) * levels / (2 * count)) for k in range(count)]


def _gradient(
    batch: Batch, slots: Slots, weights: torch.Tensor, rows: tuple[int, ...], time: int, taken: int
) -> torch.Tensor:
    """The gradient of the loss of each of some prompts, ``(b, k, V)``, at one draw of tokens and noise."""
    setting, some = batch.setting, list(rows)
    victim, latents = setting.victim, batch.latents[some]
    uniform = torch.stack(
        [torch.rand(weights.shape[1], generator=generator_for(*key)) for key in batch.keys(rows, TOKEN_STREAM, taken)]
    )
    noise = randn_for(batch.keys(rows, NOISE_STREAM, taken), latents.shape[1:]).to(latents)
    times = torch.full((len(some),), time, device=latents.device)
    relaxed = weights[some].requires_grad_()
    with torch.enable_grad():
        chosen = drawn_tokens(relaxed, uniform.to(weights)) @ victim.token_table
        told = batch.encode(rows, slots, chosen)
        said = victim.ask(victim.denoiser, victim.add_noise(latents, noise, times), times, told)
        losses = (said - victim.target(latents, noise, times)).square().flatten(1).mean(1)
        return finite_gradient(losses, relaxed)
