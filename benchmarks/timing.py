"""What the benchmarks that time training share."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


def step_times(call: Callable[[], Any]) -> list[float]:
    """Seconds from the end of one optimiser step to the end of the next, of what is called, but for the first two."""
    ends: list[float] = []

    def note(*_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    handle = register_optimizer_step_post_hook(note)
    try:
        call()
    finally:
        handle.remove()
    return [end - begin for begin, end in itertools.pairwise(ends)][1:]
