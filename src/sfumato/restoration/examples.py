"""What a restoration objective learns from: pairs of clean and degraded pictures, on the grid of the chain."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

from sfumato.pipelines.restoration import (
    condition_on_grid,
    degraded_start,
    encode_pixels,
    network_input,
    network_output,
)
from sfumato.randomness import Key, permuted_indices, randint_for, randn_for
from sfumato.restoration.degradations import Degradation, Degraded
from sfumato.restoration.networks import Autoencoder
from sfumato.restoration.pictures import Pictures
from sfumato.trainer import Shard

__all__ = ["Batch", "Examples", "HeldOut", "hold_out", "predict"]

TRAINED, HELD_OUT = range(1, 3)  # streams of the seed
PICTURE, DEGRADED, NOISE, TIME = range(1, 5)  # streams of a sample


@dataclass(frozen=True)
class Batch:
    """A process's share of a step's batch, on the model's device.

    Attributes:
        clean: x0, ``(B, C, h, w)`` on the chain's grid.
        degraded: y, of the same shape; None for generation.
        condition: What the network is told, ``(B, K, h, w)``; None if it sees the state alone.
        keys: What is random in each sample depends on its key: the seed, `TRAINED`, and its position in the run's
            samples.
    """

    clean: torch.Tensor
    degraded: torch.Tensor | None
    condition: torch.Tensor | None
    keys: Sequence[Key]

    def noise(self) -> torch.Tensor:
        """Draw standard normal noise, of the shape of x0."""
        return randn_for([(*key, NOISE) for key in self.keys], self.clean.shape[1:]).to(self.clean)

    def times(self, count: int) -> torch.Tensor:
        """Draw a time for each sample, uniformly from ``[0, count)``, ``(B,)``."""
        return randint_for([(*key, TIME) for key in self.keys], count).to(self.clean.device)


class Examples:
    """Pictures, degraded as they are drawn; a sample depends on the seed and its position in the run alone.

    Args:
        pictures: Where clean ones come from.
        degradation: How they are degraded; None for generation.
        batch_size: Samples of a step, of all processes together.
        seed: Seeds everything.
        vae: The autoencoder in whose latents the chain runs; None for pixels.
        conditioned: Whether the network is told the degraded picture.
    """

    def __init__(
        self, pictures: Pictures, degradation: Degradation | None, batch_size: int, seed: int,
        vae: Autoencoder | None = None, conditioned: bool = True,
    ) -> None:  # fmt: skip
        self.pictures, self.degradation, self.batch_size, self.seed = pictures, degradation, batch_size, seed
        self.vae, self.conditioned = vae, conditioned
        self._reader = ThreadPoolExecutor(1)
        self._ahead: dict[tuple[int, Shard], Future[torch.Tensor]] = {}

    def draw(self, model: nn.Module, step: int, shard: Shard) -> Batch:
        """Draw a shard of a step's batch; the pictures of the next step are read while the model learns from these.

        Args:
            model: The network; pictures go to its device.
            step: The step.
            shard: Which part of its batch.
        """
        reading = self._ahead.pop((step, shard), None)
        pictures = self._read(step, shard) if reading is None else reading.result()
        self._ahead = {wanted: read for wanted, read in self._ahead.items() if wanted[0] >= step}
        if (step + 1, shard) not in self._ahead:
            self._ahead[step + 1, shard] = self._reader.submit(self._read, step + 1, shard)
        _, keys = self._samples(step, shard)
        pictures = pictures.to(next(model.parameters()).device)
        with torch.no_grad(), torch.autocast(pictures.device.type, enabled=False):  # mixed precision is the network's
            clean = encode_pixels(self.vae, pictures)
            if self.degradation is None:
                return Batch(clean, None, None, keys)
            found = self.degradation.apply(pictures, [(*key, DEGRADED) for key in keys])
            degraded = encode_pixels(self.vae, degraded_start(found.picture, self.degradation.factor))
            mask = None if found.mask is None else 2 * found.mask - 1
            told = condition_on_grid(found.picture, mask, clean.shape[-2:]) if self.conditioned else None
        return Batch(clean, degraded, told, keys)

    def _samples(self, step: int, shard: Shard) -> tuple[int, list[Key]]:
        """Where a shard begins among the run's samples, and their keys."""
        span = shard.of(self.batch_size)
        start = step * self.batch_size + span.start
        return start, [(self.seed, TRAINED, start + k) for k in range(len(span))]

    def _read(self, step: int, shard: Shard) -> torch.Tensor:
        """Clean pictures (B, 3, S, S) in [-1, 1]."""
        start, keys = self._samples(step, shard)
        positions = permuted_indices(self.seed, len(self.pictures), start, len(keys))
        return self.pictures.take(positions.tolist(), [(*key, PICTURE) for key in keys])


def predict(
    model: nn.Module, state: torch.Tensor, condition: torch.Tensor | None,
    times: torch.Tensor | tuple[torch.Tensor, torch.Tensor], patch_size: int,
) -> torch.Tensor:  # fmt: skip
    """Ask a network, as the pipelines do.

    Args:
        model: A ``UNet2DModel``, or `sfumato.restoration.networks.TwoNetworks`.
        state: The chain's state ``(B, C, h, w)``, scaled as the scheduler says.
        condition: See `Batch`.
        times: What it is told of the time, ``(B,)``; for two networks a pair of these.
        patch_size: Blocks that are folded into channels.

    Returns:
        Heads ``(B, heads * C, h, w)``, float32.
    """
    output = model(network_input(state, condition, patch_size), times, return_dict=False)[0]
    return network_output(output.float(), patch_size)


@dataclass(frozen=True)
class HeldOut:
    """Pictures that are restored to see how far a run has come; the same in every run of a seed.

    Attributes:
        clean: ``(N, 3, S, S)`` in [0, 1].
        degraded: Made of these; None for generation.
        seed: Of the run.
    """

    clean: torch.Tensor
    degraded: Degraded | None
    seed: int

    def __len__(self) -> int:
        """Give the number of pictures."""
        return len(self.clean)

    def digest(self) -> str:
        """Tell these pictures from others, at 8 bits: what another machine rounds otherwise is no other picture."""
        return hashlib.sha256((255 * self.clean).round().to(torch.uint8).numpy().tobytes()).hexdigest()

    def key(self, index: int) -> Key:
        """Give the key of a picture's own noise, for `sfumato.randomness.generator_for`."""
        return (self.seed, HELD_OUT, index, NOISE)


def hold_out(pictures: Pictures, degradation: Degradation | None, count: int, seed: int) -> HeldOut:
    """Take the pictures to validate with.

    Args:
        pictures: Where they come from; none of these is trained on.
        degradation: How they are degraded; None for generation.
        count: How many, if there are so many.
        seed: Chooses and degrades them.
    """
    positions = permuted_indices(seed, len(pictures), 0, min(count, len(pictures)))
    clean = pictures.take(positions.tolist())
    keys = [(seed, HELD_OUT, index, DEGRADED) for index in range(len(clean))]
    degraded = None if degradation is None else degradation.apply(clean, keys)
    return HeldOut(clean / 2 + 0.5, degraded, seed)
