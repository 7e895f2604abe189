"""A step's pictures as the denoiser sees them: noisy, at random times, drawn by key.

Which picture, noise and time a position of a batch gets depends on the seed, the stream and the position alone, so the
shards of a batch, on however many processes, are slices of one and the same batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sfumato.families import Family
from sfumato.randomness import permuted_indices, randint_for, randn_for
from sfumato.trainer import Shard
from sfumato.unlearning.examples import Examples

__all__ = ["ORDERS", "NoisyBatch", "noised", "noisy_batch", "resampled"]

ORDERS = ("shuffled", "sequential", "first")


@dataclass(frozen=True)
class NoisyBatch:
    """A shard of a step's batch.

    Attributes:
        noisy: Noisy latents ``(B, C, H, W)``.
        timesteps: Their times ``(B,)``.
        target: What the network should predict ``(B, C, H, W)``; see `Family.target`.
        noise: The noise in them ``(B, C, H, W)``.
        clean: The latents themselves ``(B, C, H, W)``.
        rows: Which examples they are, ``(B,)``.
        captions: What they show.
        keys: What they were drawn by, one each.
    """

    noisy: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor
    noise: torch.Tensor
    clean: torch.Tensor
    rows: np.ndarray
    captions: list[str]
    keys: list[tuple[int, ...]]


def noisy_batch(
    family: Family, examples: Examples, batch_size: int, step: int, shard: Shard, *, seed: int, stream: int,
    max_timestep: int | None = None, order: str = "shuffled",
) -> NoisyBatch:  # fmt: skip
    """Draw a shard of a step's batch.

    Args:
        family: Noise schedule and prediction type.
        examples: The set to draw from.
        batch_size: Pictures of the whole batch.
        step: The step.
        shard: The slice of the batch to draw.
        seed: The run's.
        stream: What keeps these draws apart from others of the run.
        max_timestep: Draw times below this; None draws them all.
        order: ``"shuffled"``: every pass over the examples shuffles them anew; ``"sequential"``: they come in their
            own order; ``"first"``: every step has the first of them.
    """
    span = shard.of(batch_size)
    start = step * batch_size + span.start
    if order == "shuffled":
        rows = permuted_indices(seed + stream, len(examples), start, len(span))
    else:
        first = start if order == "sequential" else span.start
        rows = np.arange(first, first + len(span)) % len(examples)
    keys = [(seed, stream, start + k) for k in range(len(span))]
    return noised(family, examples, rows, keys, max_timestep)


def noised(
    family: Family, examples: Examples, rows: np.ndarray, keys: Sequence[tuple[int, ...]],
    max_timestep: int | None = None,
) -> NoisyBatch:  # fmt: skip
    """Noise examples `rows`, ``(B,)``, with posterior sample, noise and time drawn by `keys`, one for each."""
    shape = examples.mean.shape[1:]
    latents = examples.latents(rows, randn_for([(*key, 0) for key in keys], shape)).to(family.device)
    noise = randn_for([(*key, 1) for key in keys], shape).to(family.device)
    times = max_timestep or family.num_train_timesteps
    timesteps = randint_for([(*key, 2) for key in keys], times).to(family.device)
    noisy, target = family.add_noise(latents, noise, timesteps), family.target(latents, noise, timesteps)
    captions = [examples.prompts[row] for row in rows]
    return NoisyBatch(noisy, timesteps, target, noise, latents, rows, captions, list(keys))


def resampled(family: Family, examples: Examples, batch: NoisyBatch) -> torch.Tensor:
    """Noise a batch once more, at the same times with the same noise, on a posterior sample of its own.

    Args:
        family: Noise schedule.
        examples: What the batch was drawn from.
        batch: The batch.

    Returns:
        Noisy latents ``(B, C, H, W)``; those of the batch itself where the examples have no posterior.
    """
    posterior = randn_for([(*key, 3) for key in batch.keys], batch.noise.shape[1:])
    latents = examples.latents(batch.rows, posterior).to(family.device)
    return family.add_noise(latents, batch.noise, batch.timesteps)
