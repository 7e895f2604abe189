"""How much memory a run has used, and what to do when there is not enough of it."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from sfumato.trainer import checkpoints

__all__ = ["explained", "peak_memory_mb", "reset_peak_memory"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

_LESS = {
    "gradient_checkpointing": "gradient_checkpointing",
    "gradient_accumulation_steps": "a larger gradient_accumulation_steps (which does not change the result)",
    "example_batch_size": "a smaller example_batch_size",
    "trajectory_batch_size": "a smaller trajectory_batch_size",
    "mixed_precision": "mixed_precision='bf16'",
    "adapter_rank": "adapter_rank=16",
    "parameters": "fewer `parameters`",
    "batch_size": "a smaller batch_size",
}
"""What to say of settings that need memory, those first that cost least."""
_ON_THE_CPU = ("not enough memory", "can't allocate memory", "cannot allocate memory")


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_mb` count from here on, and not what this process did before.

    Where the system has no way to (resident memory, not on Linux), it stays that of the process's whole life.

    Args:
        device: Where the run will compute.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        _CLEAR.write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    """Give the peak memory of this process since `reset_peak_memory`, in megabytes; resident if on the CPU.

    Args:
        device: Where the run computes; an accelerator's own memory is counted.

    Returns:
        The peak, or, if there was no reset, that of the process so far.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if _STATUS.exists():  # what `getrusage` says there counts the program that started this one too
        peak = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        if peak:
            return int(peak[1]) * 1024 / 1e6
    scale = 1e6 if sys.platform == "darwin" else 1e6 / 1024  # bytes there, kilobytes of 1024 elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


@contextmanager
def explained(device: torch.device, output_dir: Path | None, settings: Collection[str]) -> Iterator[None]:
    """Say, where memory does not suffice, how much there was, what needs less, and what is kept.

    Args:
        device: Where the run computes.
        output_dir: The run's folder, if it has one.
        settings: The names of those that the run takes: no others are advised.

    Raises:
        MemoryError: In the place of what torch raises, which it names.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        newest = checkpoints.newest(output_dir) if output_dir is not None else None
        kept = f" {newest} is kept: go on from there with resume." if newest is not None else ""
        raise MemoryError(
            f"There is not enough memory on {device}, of which {peak_memory_mb(device):,.0f} MB were in use at the "
            f"most.{_advice(settings)}{kept}"
        ) from error


def _advice(settings: Collection[str]) -> str:
    advised = [words for name, words in _LESS.items() if name in settings]
    return f" Less is needed with, in this order: {', '.join(advised)}." if advised else ""


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, on whatever device, could not get memory; on the CPU only its words tell."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error).lower() for words in _ON_THE_CPU)
