"""The process group of a run: devices, precision and trackers, as ``accelerate launch`` was told."""

from __future__ import annotations

import atexit
import os
from dataclasses import asdict
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)

from sfumato.trainer.config import TrainingConfig
from sfumato.trainer.zero import ZeroAccelerator

__all__ = ["check_tracker", "make_accelerator", "process_group"]

PATIENCE = timedelta(hours=6)
"""How long a process waits for another: the first validates and saves alone, and NCCL would give up in 10 minutes."""


def make_accelerator(config: TrainingConfig, output_dir: str | Path | None = None) -> Accelerator:
    """Make the process group that `train` runs on, from a config and, under ``accelerate launch``, its environment.

    Args:
        config: Gives precision and tracker.
        output_dir: Tracker logs go to ``output_dir/logs``.

    Returns:
        The accelerator, with its trackers started; nothing is written before all processes are here.

    Raises:
        ValueError: If there are more processes than accelerators, trackers have nowhere to write, or the launcher asks
            for FSDP in its first version, or for what `ZeroAccelerator` does not do.
        ImportError: If the tracker's package, or DeepSpeed, is not installed.
    """
    check_tracker(config, output_dir)
    _check_devices()
    AcceleratorState._reset_state()  # else the precision of an earlier call in this process could not be left
    project = ProjectConfiguration(logging_dir=str(Path(output_dir) / "logs")) if output_dir else None
    group = InitProcessGroupKwargs(timeout=PATIENCE)
    others: dict[str, Any] = {"log_with": config.log_with, "project_config": project, "kwargs_handlers": [group]}
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        accelerator: Accelerator = ZeroAccelerator(config.mixed_precision, **others)
    else:
        accelerator = Accelerator(mixed_precision=config.mixed_precision, **others)
        _spread_on_cpus(accelerator)
    _leave_at_exit()
    accelerator.wait_for_everyone()  # a slower process may yet look whether the output folder is free
    if config.log_with:
        plain = {k: v for k, v in asdict(config).items() if isinstance(v, int | float | str | bool)}
        accelerator.init_trackers("sfumato", config=plain)
    return accelerator


def check_tracker(config: TrainingConfig, output_dir: str | Path | None) -> None:
    """Refuse a tracker that can't be started.

    Args:
        config: Names it.
        output_dir: As for `make_accelerator`.

    Raises:
        ValueError: If it has nowhere to write.
        ImportError: If its package is not installed.
    """
    if config.log_with and output_dir is None:
        raise ValueError(f"log_with={config.log_with!r} needs an output folder for its logs.")
    if config.log_with and config.log_with not in {str(tracker) for tracker in get_available_trackers()}:
        raise ImportError(f"log_with={config.log_with!r} needs a package that is not installed, or is no tracker.")


def process_group() -> PartialState | None:
    """Join the processes that ``accelerate launch`` started; None if there is but one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    if not PartialState._shared_state:
        make_accelerator(TrainingConfig())  # knows what to do on machines without an accelerator
    return PartialState()


@cache
def _leave_at_exit() -> None:
    """End the process group before the interpreter does: threads of it that outlive Python abort."""
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)


def _check_devices() -> None:
    """Refuse more processes than there are accelerators, of which CUDA would only say that a number is invalid."""
    here, place = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if here and place >= here and os.environ.get("ACCELERATE_USE_CPU") != "true":
        raise ValueError(
            f"This machine has {here} CUDA devices, fewer than the {os.environ.get('LOCAL_WORLD_SIZE', place + 1)} "
            f"processes that were started on it: launch with --num_processes {here}, or with another config."
        )


def _spread_on_cpus(accelerator: Accelerator) -> None:
    """Let FSDP2 spread weights over processes without an accelerator too, as its launcher asked: not in accelerate."""
    asked = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if asked and accelerator.device.type == "cpu" and accelerator.num_processes > 1:
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("Weights are spread by FSDP2 only: set fsdp_version: 2 in accelerate's config.")
