"""Choose what a sampler can't choose for itself: window and cutoff of the time shift, for one model and step count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.evaluation.metrics import frechet_distance
from sfumato.schedulers.scheduling_time_shift import TimeShiftScheduler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["TimeShiftChoice", "principal_components", "tune_time_shift"]

RESAMPLES, CERTAIN = 100, 0.95
Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TimeShiftChoice:
    """The best of the candidates, and what was measured.

    Attributes:
        scheduler: A `TimeShiftScheduler` with the chosen `window` and `cutoff`; its window is 0 if no shift was better
            than none beyond chance.
        distances: Fréchet distance of each candidate (window, cutoff), on the half that chooses; (0, None) is the
            sampler without a shift.
        confidence: Share of resamples of the other half in which the best shift was better than none.
    """

    scheduler: TimeShiftScheduler
    distances: dict[tuple[int, int | None], float]
    confidence: float


@torch.no_grad()
def tune_time_shift(
    pipe: DiffusionPipeline,
    pictures: Tensor,
    *,
    num_inference_steps: int,
    windows: Sequence[int] = (10, 20, 40, 80),
    cutoffs: Sequence[int] = (100, 300, 500, 700),
    features: Features | None = None,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    **call: Any,
) -> TimeShiftChoice:
    """Draw with every window and cutoff, and without a shift, and keep what comes nearest to real pictures.

    The best of many candidates looks better than it is. So they are compared on one half of the drawn pictures, and
    the best of them is kept only if it beats no shift in 95 % of resamples (bootstrap) of the other half, both drawn
    from the same noise.

    The paper chooses both for every data set and number of steps, by FID. Here the Fréchet distance is taken between
    `features`, by default the first principal components of the real pixels, so nothing needs to be downloaded. Report
    figures of the result on other pictures and another seed.

    Args:
        pipe: A pixel-space pipeline with a schedule of betas; its scheduler is put back at the end.
        pictures: Real ones, ``(M, C, H, W)`` in [0, 1], of the size that `pipe` draws.
        num_inference_steps: Number of steps N to choose for.
        windows: Candidates for the `window` of the scheduler.
        cutoffs: Candidates for its `cutoff`; every pair is tried.
        features: Gives ``(B, F)`` for pictures ``(B, C, H, W)`` in [0, 1].
        seed: Seeds the noise, the same for all candidates.
        settings: Other arguments of `TimeShiftScheduler`: `solver`, `mode`, `data_variance`.
        **call: Arguments of `pipe`, which say how many pictures it draws: `batch_size`, or `class_labels`. A few
            hundred; the distance of fewer says little.

    Returns:
        The choice, with its scheduler.

    Raises:
        ValueError: If there is no candidate, fewer than four pictures are drawn, or the shapes of real and drawn ones
            differ.
    """
    if pictures.ndim != 4 or len(pictures) < 2:
        raise ValueError(f"`pictures` must be at least two, (M, C, H, W), got shape {tuple(pictures.shape)}.")
    candidates: list[tuple[int, int | None]] = [(0, None), *product(windows, cutoffs)]
    if len(candidates) == 1:
        raise ValueError("Give at least one window and one cutoff to choose from.")
    kept = pipe.scheduler
    schedulers = {
        (window, cutoff): TimeShiftScheduler.from_config(kept.config, window=window, cutoff=cutoff, **(settings or {}))
        for window, cutoff in candidates
    }
    features = features or principal_components(pictures)
    real = features(pictures)
    seen = {}
    try:
        for candidate, pipe.scheduler in schedulers.items():
            generator = torch.Generator().manual_seed(seed)
            drawn = pipe(num_inference_steps=num_inference_steps, generator=generator, output_type="pt", **call).images
            drawn = torch.as_tensor(drawn).to(pictures)
            if len(drawn) < 4:
                raise ValueError(f"A few hundred pictures must be drawn to choose by, got {len(drawn)}.")
            if drawn.shape[1:] != pictures.shape[1:]:
                shapes = f"{tuple(pictures.shape[1:])} and {tuple(drawn.shape[1:])}"
                raise ValueError(f"Real and drawn pictures must have the same channels and size, got {shapes}.")
            seen[candidate] = features(drawn)
    finally:
        pipe.scheduler = kept
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed))
    chooses, confirms = order[::2], order[1::2]
    distances = {candidate: frechet_distance(values[chooses], real) for candidate, values in seen.items()}
    none = candidates[0]
    best = min(candidates[1:], key=lambda candidate: distances[candidate])
    confidence = _confidence(seen[best][confirms], seen[none][confirms], real, seed)
    return TimeShiftChoice(schedulers[best if confidence >= CERTAIN else none], distances, confidence)


def _confidence(shifted: Tensor, plain: Tensor, real: Tensor, seed: int) -> float:
    """Share of resamples of paired pictures in which the first set is nearer to the real one."""
    generator = torch.Generator().manual_seed(seed)
    better = 0
    for _ in range(RESAMPLES):
        rows = torch.randint(len(plain), (len(plain),), generator=generator)
        better += frechet_distance(shifted[rows], real) < frechet_distance(plain[rows], real)
    return better / RESAMPLES


def principal_components(pictures: Tensor, count: int = 32) -> Features:
    """Make features of pictures: what they hold of the first principal components of these, ``(M, C, H, W)``."""
    flat = pictures.flatten(1).double()
    mean = flat.mean(0)
    count = min(count, *flat.shape)
    _, _, directions = torch.linalg.svd(flat - mean, full_matrices=False)  # rows, largest first
    return lambda images: (images.flatten(1).double() - mean) @ directions[:count].T
