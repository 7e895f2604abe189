r"""The worst-case forget set: of some candidates, the m that a method finds hardest to forget.

A two-level problem over weights w of the candidates z_i:

.. math::
    \min_{w \in S} \sum_i w_i\, \ell_i(\theta_u(w)) + \gamma \|w\|^2, \qquad S = \{0 \le w \le 1,\; 1^T w = m\},
    \qquad \theta_u(w) = \arg\min_\theta \sum_i w_i\, \ell^{forget}_i(\theta) + (1 - w_i)\, \ell^{retain}_i(\theta) .

The upper level looks for what the unlearned model still knows: a low loss l_i of the *unlearned* model on candidate i.
Its gradient is taken as :math:`\ell_i(\theta_u(w)) + 2 \gamma w_i`, without that of theta_u, which is zero almost
everywhere when the lower level descends by the sign of its gradient; then w is projected back onto S:

.. math::
    w \leftarrow \mathrm{clip}(w - \eta g - \mu, 0, 1), \qquad \mu : \textstyle\sum_i w_i = m .

The lower level is any unlearner, a function from weights to a model. Here are three: UCE, whose closed form takes
weights as they are (`weighted_uce`); descent by sign, as in the paper (`sign_descent`); and any other method, on the m
candidates of greatest weight (`by_name`).

Fan, Liu, Hero, Liu, "Challenging Forgets: Unveiling the Worst-Case Forget Sets in Machine Unlearning", ECCV 2024,
arXiv 2403.07362. Where this differs from the released code: the sign step is taken (``signed=False`` of
`sign_descent` is a plain gradient step, as there but for the momentum of 0.9 and the weight decay of 5e-4; by it, at
their rate of 1e-5, diffusion models hardly forget); the upper loss
is the prediction's (there the noise is divided by 1000: ``legacy_scaled_noise`` of `DenoisingResidual`); each prompt
has its own embedding (``legacy_first_prompt``, likewise); and the set returned is the best that was tried, not the
last, which `WorstCase.history` has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import combinations
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from sfumato import concepts
from sfumato.families import Family, family_of
from sfumato.progress import are_hidden
from sfumato.randomness import permuted_indices, randint_for, randn_for
from sfumato.trainer import Shard, TrainingConfig, train
from sfumato.unlearning import closed_form, core, methods, uce
from sfumato.unlearning.examples import PromptTable
from sfumato.unlearning.residual import DenoisingResidual
from sfumato.unlearning.uce import UCEConfig

__all__ = [
    "Candidate",
    "Scorer",
    "Unlearner",
    "WorstCase",
    "by_name",
    "candidates_of",
    "indicator",
    "project",
    "sign_descent",
    "weighted_uce",
    "worst_case_forget_set",
]

ORDER_STREAM, DESCENT_STREAM = 402, 403
WEIGHTED = ("uce", "sign_descent")

Unlearner = Callable[[torch.Tensor], DiffusionPipeline]
"""From weights ``(n,)`` in [0, 1], float64, to the model that has forgotten the candidates in that measure."""
Scorer = Callable[[DiffusionPipeline], torch.Tensor]
"""From an unlearned model to what is left of each candidate, ``(n,)``: the lower, the more."""


@dataclass(frozen=True)
class Candidate:
    """Something that may be forgotten.

    Attributes:
        name: What the user called it.
        prompts: Prompts that ask for it.
        anchors: What each should mean afterwards.
    """

    name: str
    prompts: tuple[str, ...]
    anchors: tuple[str, ...]

    @property
    def phrases(self) -> tuple[str, ...]:
        """As of a `sfumato.concepts.Concept`."""
        return (self.name,)


@dataclass(frozen=True)
class WorstCase:
    """What the search found.

    Attributes:
        chosen: The worst-case forget set, in the order of the candidates.
        residual: Mean score of the chosen after they, and only they, were forgotten.
        weights: Weights of all candidates at the end of the search, ``(n,)``.
        history: A row for each round: its ``weights``, the ``chosen`` m of greatest weight, the ``scores`` of all
            after it, and the ``objective``.
        sets: Every set that was tried, with its residual; the chosen is the one with the lowest.
    """

    chosen: tuple[str, ...]
    residual: float
    weights: torch.Tensor
    history: list[dict[str, Any]] = field(default_factory=list)
    sets: dict[tuple[str, ...], float] = field(default_factory=dict)


def project(weights: torch.Tensor, total: float) -> torch.Tensor:
    r"""Project onto :math:`\{0 \le w \le 1, \sum w = total\}`, exactly, by sorting.

    The sum of :math:`\mathrm{clip}(w - \mu, 0, 1)` falls piecewise linearly in mu, with kinks at w_i and w_i - 1.

    Args:
        weights: ``(n,)``, finite.
        total: In [0, n].

    Returns:
        The nearest point, ``(n,)``, float64.
    """
    values = weights.double()
    if values.ndim != 1 or not torch.isfinite(values).all() or not 0 <= total <= len(values):
        raise ValueError(
            f"The projection needs finite weights (n,) and a sum in [0, n], got {tuple(weights.shape)}, {total}."
        )
    kinks = torch.cat([values - 1, values]).sort().values
    sums = (values[None] - kinks[:, None]).clamp(0, 1).sum(1)  # falling, from n to 0
    right = int((sums > total).sum().clamp(1, len(kinks) - 1))
    high, low = sums[right - 1], sums[right]
    share = (high - total) / (high - low) if high > low else torch.zeros_like(high)
    shift = kinks[right - 1] + share * (kinks[right] - kinks[right - 1])
    return (values - shift).clamp(0, 1)


def worst_case_forget_set(
    pipe: DiffusionPipeline,
    candidates: Sequence[str],
    m: int,
    *,
    unlearner: str | Unlearner = "uce",
    scorer: Scorer | None = None,
    anchor: str | None = None,
    rounds: int = 10,
    learning_rate: float = 0.1,
    gamma: float = 0.0,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> WorstCase:
    """Find the m candidates that an unlearner leaves the most of.

    Args:
        pipe: The original model; its weights are not changed.
        candidates: ``n`` phrases, each a concept as `sfumato.unlearn` takes it, such as ``"mosaic sneaker"``.
        m: How many to forget, from 1 to ``n - 1``.
        unlearner: ``"uce"`` (weighted), ``"sign_descent"``, another name in `sfumato.unlearning.methods.METHODS`, or a
            function from weights ``(n,)`` to a pipeline. Methods found by name forget the m of greatest weight.
        scorer: What is left of each candidate, low where there is much. Default: the denoising loss on pictures of
            each, drawn by the original, over the original's own loss on them, since some are merely harder to
            denoise. ``DenoisingResidual(pipe, prompts)`` is the paper's plain loss.
        anchor: What to show instead of any candidate; default as in `sfumato.concepts.resolve`.
        rounds: Steps of the upper level.
        learning_rate: eta.
        gamma: Weight of the squared norm; a greater one spreads the weights.
        seed: Seeds everything random.
        settings: Settings of the unlearner, where it is given by name.

    Returns:
        The set, the weights and how they were found.

    Raises:
        ValueError: If m, a candidate, the unlearner or a setting is impossible.
    """
    _check(candidates, m, rounds, learning_rate, gamma)
    found = candidates_of(pipe, candidates, anchor)
    unlearn = _unlearner(pipe, found, m, unlearner, anchor, seed, dict(settings or {}))
    score = _relative(pipe, found, seed) if scorer is None else scorer
    weighted = not isinstance(unlearner, str) or unlearner in WEIGHTED
    known: dict[tuple[float, ...], torch.Tensor] = {}

    def scores_after(weights: torch.Tensor) -> torch.Tensor:
        key = tuple(weights.tolist())
        if key not in known:
            known[key] = _scored(score, unlearn(weights), len(found))
        return known[key]

    weights = torch.full((len(found),), m / len(found), dtype=torch.float64)
    history, sets = list[dict[str, Any]](), dict[tuple[str, ...], float]()
    for number in tqdm(range(rounds + 1), desc="worst case", disable=are_hidden()):
        binary = indicator(weights, m)
        chosen = binary.bool()
        names = tuple(one.name for one, is_chosen in zip(found, chosen.tolist(), strict=True) if is_chosen)
        if number or not weighted:  # the weights of the first round choose nothing yet
            sets[names] = float(scores_after(binary)[chosen].mean())
        if number == rounds:
            break
        scores = scores_after(weights if weighted else binary)
        history.append(
            {
                "round": number,
                "objective": float(weights @ scores) + gamma * float(weights.square().sum()),
                "chosen": names,
                "scores": scores.tolist(),
                "weights": weights.tolist(),
            }
        )
        weights = project(weights - learning_rate * (scores + 2 * gamma * weights), m)
    best = min(sets, key=sets.__getitem__)
    return WorstCase(best, sets[best], weights, history, sets)


def _check(candidates: Sequence[str], m: int, rounds: int, learning_rate: float, gamma: float) -> None:
    if isinstance(candidates, str) or len(set(candidates)) != len(candidates):
        raise ValueError("`candidates` must be a list of different phrases.")
    if not 1 <= m < len(candidates):
        raise ValueError(
            f"`m` must lie between 1 and the number of candidates less one, {len(candidates) - 1}; got {m}."
        )
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1, got {rounds}.")
    if learning_rate <= 0 or gamma < 0:
        raise ValueError(f"`learning_rate` must be positive and `gamma` not negative, got {learning_rate}, {gamma}.")


def candidates_of(pipe: DiffusionPipeline, phrases: Sequence[str], anchor: str | None = None) -> list[Candidate]:
    """Resolve phrases one by one, as `sfumato.concepts.resolve` does for `sfumato.unlearn`."""
    resolved = [concepts.resolve(pipe, phrase, anchor=anchor) for phrase in phrases]
    return [Candidate(concept.name, concept.prompts, concept.anchors) for concept in resolved]


def indicator(weights: torch.Tensor, m: int) -> torch.Tensor:
    """Give 1 at the m greatest weights, of equal ones the first, and 0 elsewhere, ``(n,)``, float64."""
    order = torch.sort(weights, descending=True, stable=True).indices
    return torch.zeros(len(weights), dtype=torch.float64).index_fill_(0, order[:m], 1)


def _scored(score: Scorer, pipe: DiffusionPipeline, count: int) -> torch.Tensor:
    scores = torch.as_tensor(score(pipe), dtype=torch.float64).cpu()
    if scores.shape != (count,) or not torch.isfinite(scores).all():
        raise ValueError(f"The scorer must give {count} finite numbers, one a candidate; got {scores.tolist()}.")
    return scores


def _relative(pipe: DiffusionPipeline, candidates: Sequence[Candidate], seed: int) -> Scorer:
    """Denoising loss over that of the original model."""
    measure = DenoisingResidual(pipe, [min(one.prompts, key=len) for one in candidates], seed=seed)
    before = measure(pipe)
    return lambda unlearned: measure(unlearned) / before


def _unlearner(
    pipe: DiffusionPipeline, candidates: Sequence[Candidate], m: int, given: str | Unlearner, anchor: str | None,
    seed: int, settings: dict[str, Any],
) -> Unlearner:  # fmt: skip
    if not isinstance(given, str):
        if settings:
            raise ValueError("`settings` are for an unlearner given by name; give them to your function yourself.")
        return given
    if given == "uce":
        return weighted_uce(pipe, candidates, **settings)
    if given == "sign_descent":
        return sign_descent(pipe, candidates, seed=seed, **settings)
    return by_name(pipe, candidates, m, given, anchor=anchor, seed=seed, **settings)


def weighted_uce(pipe: DiffusionPipeline, candidates: Sequence[Candidate], **settings: Any) -> Unlearner:
    """Make an unlearner of UCE: candidate i is edited with the weight ``w_i s_e`` and kept with ``(1 - w_i) s_p``.

    Args:
        pipe: The original model.
        candidates: What may be forgotten.
        **settings: Fields of `UCEConfig`.
    """
    config, family = UCEConfig(**settings), closed_form.text_family(family_of(pipe))
    asked = [closed_form.prompt_pairs(one, config.templates) for one in candidates]
    of = torch.tensor([k for k, some in enumerate(asked) for _ in some])
    pairs = closed_form.embedding_pairs(family, [pair for some in asked for pair in some], config.positions)
    prompts = _kept_by_all(pipe, candidates)
    scale = closed_form.preserve_scale(config, len(prompts))
    kept = scale * closed_form.gram_of_prompts(family, prompts, config.positions)
    own = scale * torch.stack(
        [closed_form.gram_of_prompts(family, one.prompts, config.positions) for one in candidates]
    )  # (n, width, width)
    names = family.trainable_parameters(config.parameters)

    def unlearn(weights: torch.Tensor) -> DiffusionPipeline:
        edited = copy.deepcopy(family.denoiser)
        matrices = {name: weight for name, weight in edited.named_parameters() if name in names and weight.ndim == 2}
        wanted = kept + torch.einsum("n,nij->ij", 1 - weights, own)
        uce.solve(matrices, pairs, wanted, config, scales=config.edit_scale * weights[of][pairs.owner])
        return family.with_parts({"denoiser": edited})

    return unlearn


def _kept_by_all(pipe: DiffusionPipeline, candidates: Sequence[Candidate]) -> list[str]:
    """Prompts to keep whatever is forgotten: those that every candidate's retain set has, and the empty prompt."""
    named = {prompt for one in candidates for prompt in one.prompts}
    retained = [concepts.resolve(pipe, one.name).retain for one in candidates]
    common = set(retained[0]).intersection(*retained[1:]) - named
    return [*(prompt for prompt in retained[0] if prompt in common), ""]


class SignDescentObjective:
    r"""The lower level of the paper: :math:`\sum_i w_i \ell^{forget}_i + (1 - w_i) \ell^{retain}_i`, stepped by sign.

    Forgetting is seeing a candidate's pictures as the original would under its anchor, retaining is denoising them.

    Args:
        original: The model before.
        measure: The candidates' pictures, by the original.
        anchors: The anchor prompt of each candidate.
        weights: w, ``(n,)``.
        batch_size: Pictures in a step.
        seed: Seeds order, noise and times.
        signed: Step by the sign of the gradient; False: by the gradient.
    """

    def __init__(
        self, original: Family, measure: DenoisingResidual, anchors: Sequence[str], weights: torch.Tensor,
        batch_size: int, seed: int, signed: bool = True,
    ) -> None:  # fmt: skip
        self.original, self.measure, self.weights = original, measure, weights
        self.anchors = [anchor for anchor in anchors for _ in range(measure.pictures)]
        self.prompts = PromptTable(original, [*measure.captions, *anchors])
        self.batch_size, self.seed, self.signed = batch_size, seed, signed

    def losses(self, model: torch.nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """Give the terms ``forget`` and ``retain``."""
        span, family = shard.of(self.batch_size), self.original
        start, count = step * self.batch_size + span.start, len(span)
        index = permuted_indices(self.seed + ORDER_STREAM, len(self.measure.captions), start, count)
        keys = [(self.seed, DESCENT_STREAM, start + k) for k in range(count)]
        latents = self.measure.latents[torch.from_numpy(index)]
        noise = randn_for([(*key, 0) for key in keys], latents.shape[1:]).to(latents)
        times = randint_for([(*key, 1) for key in keys], family.num_train_timesteps).to(latents.device)
        noisy = family.add_noise(latents, noise, times)
        captions, anchors = ([texts[i] for i in index] for texts in (self.measure.captions, self.anchors))
        student = family.ask(model, noisy, times, self.prompts(captions))
        with torch.no_grad():
            anchored = family.ask(family.denoiser, noisy, times, self.prompts(anchors))
        weights = self.weights[torch.from_numpy(index) // self.measure.pictures].to(student)  # (B,)
        forget = (student - anchored).square().flatten(1).mean(1)
        retain = (student - family.target(latents, noise, times)).square().flatten(1).mean(1)
        return {"forget": (weights * forget).mean(), "retain": ((1 - weights) * retain).mean()}

    def combine(self, gradients: Mapping[str, list[torch.Tensor]]) -> list[torch.Tensor]:
        """Give the sign of the whole gradient, which makes plain SGD sign descent."""
        whole = [torch.stack(terms).sum(0) for terms in zip(*gradients.values(), strict=True)]
        return [gradient.sign() for gradient in whole] if self.signed else whole


def sign_descent(
    pipe: DiffusionPipeline,
    candidates: Sequence[Candidate],
    *,
    steps: int = 20,
    learning_rate: float = 3e-4,
    batch_size: int = 32,
    parameters: str = "xattn",
    seed: int = 0,
    signed: bool = True,
) -> Unlearner:
    """Make the paper's lower level: a few steps of descent by the sign of the weighted gradient.

    Args:
        pipe: The original model, in float32.
        candidates: What may be forgotten; the first prompt of each is trained on.
        steps: Steps of each round, which begins at the original's weights.
        learning_rate: beta: each weight moves by it in each step; not so with ``signed=False``.
        batch_size: Pictures in a step.
        parameters: Which weights move; see `Family.trainable_parameters`.
        seed: Seeds pictures, order, noise and times.
        signed: Step by the sign of the gradient; False steps by the gradient itself.
    """
    family = family_of(pipe)
    if family.denoiser.dtype != torch.float32:
        raise ValueError(
            f"Sign descent needs a model in float32, got {family.denoiser.dtype}; use pipe.to(torch.float32)."
        )
    names = set(family.trainable_parameters(parameters))
    measure = DenoisingResidual(pipe, [one.prompts[0] for one in candidates], seed=seed)
    training = TrainingConfig(steps=steps, learning_rate=learning_rate, optimizer="sgd", seed=seed)

    def unlearn(weights: torch.Tensor) -> DiffusionPipeline:
        model = copy.deepcopy(family.denoiser).float()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        anchors = [one.anchors[0] for one in candidates]
        train(
            model, SignDescentObjective(family, measure, anchors, weights, batch_size, seed, signed), training,
            description="sign descent",
        )  # fmt: skip
        return family.with_parts({"denoiser": model.requires_grad_(False)})

    return unlearn


def by_name(
    pipe: DiffusionPipeline,
    candidates: Sequence[Candidate],
    m: int,
    method: str,
    *,
    anchor: str | None = None,
    seed: int = 0,
    **settings: Any,
) -> Unlearner:
    """Make an unlearner of any method: it forgets the m candidates of greatest weight.

    Args:
        pipe: The original model.
        candidates: What may be forgotten.
        m: How many are.
        method: One of `sfumato.unlearning.methods.METHODS`.
        anchor: What to show instead of any candidate.
        seed: Seeds the method, if it is random.
        **settings: As `sfumato.unlearn` takes them.

    Raises:
        ValueError: If the method is unknown, or the default anchor of one candidate is another, so that they can't be
            forgotten together.
    """
    seeded = any(part.name == "seed" for config in methods.method_named(method).configs for part in fields(config))
    chosen_settings: dict[str, Any] = {**({"seed": seed} if seeded else {}), **settings}
    for one, other in combinations(candidates, 2) if m > 1 else ():
        concepts.resolve(pipe, [one.name, other.name], anchor=anchor)

    def unlearn(weights: torch.Tensor) -> DiffusionPipeline:
        chosen = [one.name for one, kept in zip(candidates, indicator(weights, m).tolist(), strict=True) if kept]
        return core.unlearn(pipe, chosen, method, anchor=anchor, verify=False, **chosen_settings)

    return unlearn
