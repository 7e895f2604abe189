"""Random numbers that depend on what they are for, not on who draws them or when.

Each sample of each step has a generator of its own, seeded by a key such as ``(seed, step, position)``. Noise, times
and data order are therefore the same on one process or eight, on CPU or GPU, in an uninterrupted run or a resumed one,
and there is no generator state to save.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["generator_for", "permuted_indices", "randint_for", "randn_for", "rng_for"]

Key = tuple[int, ...]


def generator_for(*key: int) -> torch.Generator:
    """Make a CPU generator from a key of non-negative integers.

    Args:
        key: For instance ``(seed, step, position)``.

    Returns:
        A fresh generator; equal keys give equal streams.
    """
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & 0x7FFF_FFFF_FFFF_FFFF)


def rng_for(*key: int) -> np.random.Generator:
    """Make a numpy generator from a key of non-negative integers.

    Args:
        key: For instance ``(seed, step)``.

    Returns:
        A fresh generator; equal keys give equal streams.
    """
    return np.random.default_rng(key)


def randn_for(keys: Sequence[Key], shape: Sequence[int]) -> torch.Tensor:
    """Draw standard normal noise, each sample from the generator of its own key.

    Args:
        keys: One key a sample.
        shape: The shape of one sample.

    Returns:
        Noise of shape ``(len(keys), *shape)``, float32, on the CPU.
    """
    return torch.stack([torch.randn(tuple(shape), generator=generator_for(*key)) for key in keys])


def randint_for(keys: Sequence[Key], high: int) -> torch.Tensor:
    """Draw integers in ``[0, high)``, each from the generator of its own key.

    Args:
        keys: One key a sample.
        high: The exclusive upper end.

    Returns:
        Integers of shape ``(len(keys),)``, int64, on the CPU.
    """
    return torch.cat([torch.randint(high, (1,), generator=generator_for(*key)) for key in keys])


def permuted_indices(seed: int, size: int, start: int, count: int) -> np.ndarray:
    """Read an endless sequence of shuffled passes over ``range(size)``.

    Args:
        seed: Chooses the shuffles.
        size: The length of one pass.
        start: The position to read from.
        count: How many indices to read.

    Returns:
        Indices of shape ``(count,)``; entry ``k`` depends only on ``(seed, size, start + k)``.
    """
    positions = np.arange(start, start + count)
    passes = positions // size
    orders = {number: rng_for(seed, int(number)).permutation(size) for number in np.unique(passes)}
    return np.array([orders[number][position % size] for number, position in zip(passes, positions, strict=True)], int)
