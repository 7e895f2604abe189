"""Whether the concept is in fact gone, and what happened to its neighbours: asked at the end of every run.

Of any model, by its predictions on noised pictures that the original drew: how far those for the concept's prompts
have moved, against what tells the concept from its anchor, and how far those for retained prompts have drifted,
against what tells them from the empty prompt. Of a model with a judge, also by pictures, from the same noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from sfumato.concepts import Concept, Vocabulary, vocabulary_of
from sfumato.evaluation.detectors import judge_of
from sfumato.evaluation.generation import draw
from sfumato.evaluation.judge import Judge
from sfumato.evaluation.unlearning import shows
from sfumato.families import Family, family_of
from sfumato.randomness import generator_for, randn_for

__all__ = ["Verdict", "can_judge", "pronounce", "require_known"]

STREAM = 901
PICTURES, STEPS, TIMES = 6, 20, (0.2, 0.5, 0.8)  # of each kind, to draw them with, and shares of the schedule
RETAINED = 72  # judged pictures that should stay as they are
GONE = 0.9  # share of pictures without the concept from which on it is called gone


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        moved: Root mean square change of the predictions for the concept's prompts, over that between concept and
            anchor.
        drifted: The same for retained prompts, over that between them and the empty prompt.
        gone: Share of the concept's pictures that no longer show it; None without a judge.
        shown_before: Share of the original's pictures that did show it; likewise.
        neighbours: Other word of the concept's domain to the shares of its pictures judged right, before and after.
    """

    moved: float
    drifted: float
    gone: float | None = None
    shown_before: float | None = None
    neighbours: Mapping[str, tuple[float, float]] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return asdict(self)

    def sentence(self, name: str, expected: tuple[float, float] | None = None) -> str:
        """Say it in words.

        Args:
            name: Of the concept.
            expected: The range, in percent, in which the recipe's authors saw the share of pictures without it.
        """
        text = (
            f"Predictions for {name!r} moved by {self.moved:.2f} of what tells it from its anchor, those for retained "
            f"prompts by {self.drifted:.2f} of what their prompts do."
        )
        if self.gone is None or self.neighbours is None or self.shown_before is None:
            return f"{text} There is no judge that knows {name!r}: draw it, to see whether it is gone."
        state = f"{name!r} is gone" if self.gone >= GONE else f"{name!r} is NOT gone"
        shares = ", ".join(f"{word} {100 * a:.0f} -> {100 * b:.0f} %" for word, (a, b) in self.neighbours.items())
        seen = f"{100 * self.gone:.0f} % of its pictures do not show it, {100 * (1 - self.shown_before):.0f} % before"
        if expected is not None:
            seen += f" (expected of the recipe: {expected[0]:.0f} to {expected[1]:.0f} %)"
        return f"{state}: {seen}. Neighbours: {shares}. {text}"


def pronounce(pipe: DiffusionPipeline, result: DiffusionPipeline, concept: Concept, seed: int) -> Verdict:
    """Compare a model before and after.

    Args:
        pipe: The original.
        result: The unlearned model.
        concept: What was to be forgotten.
        seed: Seeds the pictures.
    """
    before, after = family_of(pipe), family_of(result)
    asked = dict(zip(_spread(concept.prompts), _spread(concept.anchors), strict=True))
    moved = _change(before, after, list(asked), list(asked.values()), seed)
    kept = _spread(concept.retain)
    drifted = _change(before, after, kept, [""] * len(kept), seed)
    vocabulary, judge = vocabulary_of(pipe), None
    if vocabulary is not None:
        judge = judge_of(vocabulary)
    if vocabulary is None or judge is None:
        return Verdict(moved, drifted)
    return Verdict(moved, drifted, **_judged(pipe, result, vocabulary, judge, concept.phrases, seed))


@torch.no_grad()
def require_known(family: Family, concept: Concept) -> None:
    """Raise a ValueError if the model's prediction does not depend on whether it is asked for a phrase."""
    prompts = [*concept.asked, ""]
    latents = randn_for([(STREAM, 0)], family.latent_shape).repeat(len(prompts), 1, 1, 1).to(family.device)
    times = torch.full((len(prompts),), int(0.8 * family.num_train_timesteps), device=family.device)
    *asked, empty = _predict(family, latents, times, prompts)
    for phrase, prediction in zip(concept.phrases, asked, strict=True):
        if (prediction - empty).norm() <= 1e-4 * empty.norm():
            raise ValueError(
                f"The model's output is the same with and without {phrase!r}: it does not know the concept, or its "
                "text encoder is disconnected. Name a concept that it draws."
            )


def _spread(prompts: Sequence[str]) -> list[str]:
    """At most `PICTURES` of them, evenly spread."""
    count = min(PICTURES, len(prompts))
    return [prompts[k * len(prompts) // count] for k in range(count)]


@torch.no_grad()
def _change(before: Family, after: Family, prompts: Sequence[str], others: Sequence[str], seed: int) -> float:
    """Change of the predictions for prompts, over the difference that the other prompts make."""
    generators = [generator_for(seed, STREAM, k) for k in range(len(prompts))]
    latents = before.generate(
        prompts, generators, num_inference_steps=STEPS, guidance_scale=3.0, latents_only=True
    ).float()
    change = difference = 0.0
    for number, share in enumerate(TIMES):
        noise = randn_for([(seed, STREAM, number, k) for k in range(len(prompts))], latents.shape[1:]).to(latents)
        times = torch.full((len(prompts),), int(share * before.num_train_timesteps), device=latents.device)
        noisy = before.add_noise(latents, noise, times)
        first = _predict(before, noisy, times, prompts)
        change += (_predict(after, noisy, times, prompts) - first).square().sum().item()
        difference += (_predict(before, noisy, times, others) - first).square().sum().item()
    return (change / max(difference, 1e-20)) ** 0.5


def _predict(family: Family, noisy: torch.Tensor, times: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return family.ask(family.denoiser, noisy, times, family.encode_prompts(prompts))


def can_judge(pipe: DiffusionPipeline) -> bool:
    """Whether there is a judge for a model's pictures."""
    vocabulary = vocabulary_of(pipe)
    return vocabulary is not None and judge_of(vocabulary) is not None


def _judged(
    pipe: DiffusionPipeline, result: DiffusionPipeline, vocabulary: Vocabulary, judge: Judge, names: Sequence[str],
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Draw the concept's prompts and a share of the others with both models, and judge what they show."""
    targets = [vocabulary.parse(name) for name in names]
    rows = vocabulary.combinations({})
    forget = [row for row in rows if shows(row, targets)]
    others = [row for row in rows if row not in forget]
    others = [others[k * len(others) // RETAINED] for k in range(min(RETAINED, len(others)))]
    prompts = [vocabulary.prompt(row) for row in (*forget, *others)]
    domains = list(dict.fromkeys(domain for target in targets for domain in target))
    shown = []
    for model, label in (pipe, "check the original"), (result, "check the result"):
        words = judge.describe(draw(model, prompts, seed=seed, num_inference_steps=STEPS, description=label))
        still = [shows(word, targets) for word in words[: len(forget)]]
        right: dict[str, list[bool]] = {}
        for row, word in zip(others, words[len(forget) :], strict=True):
            for domain in domains:
                right.setdefault(row[domain], []).append(word[domain] == row[domain])
        shown.append((sum(still) / len(still), {word: sum(hits) / len(hits) for word, hits in right.items()}))
    (before, there), (after, here) = shown
    return {
        "gone": 1 - after,
        "shown_before": before,
        "neighbours": {word: (there[word], here[word]) for word in there},
    }
