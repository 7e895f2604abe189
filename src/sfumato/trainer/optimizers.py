"""The optimisers that a run can have; their learning rate is set at every step."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from sfumato.trainer.config import TrainingConfig

__all__ = ["check_optimizer", "make_optimizer"]

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
_EIGHT_BIT = {"adam8bit": "Adam8bit", "adamw8bit": "AdamW8bit"}


def check_optimizer(name: str, accelerator: Accelerator) -> None:
    """Refuse an 8-bit optimiser where it does not work.

    Args:
        name: The optimiser.
        accelerator: Where it would run.

    Raises:
        ValueError: If it is not for this device, or these processes.
        ImportError: If bitsandbytes is not installed.
    """
    if name not in _EIGHT_BIT:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("An 8-bit optimizer needs bitsandbytes: pip install bitsandbytes.")
    spread = "FSDP2" if accelerator.is_fsdp2 else "DeepSpeed" if accelerator.deepspeed_plugin is not None else None
    if accelerator.device.type != "cuda" or spread:
        where = f"weights that {spread} spreads" if spread else str(accelerator.device)
        raise ValueError(f"An 8-bit optimizer works on a CUDA device with whole weights, not on {where}: use 'adam'.")


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter], config: TrainingConfig, *, spread: bool
) -> torch.optim.Optimizer:
    """Make the optimiser of a run.

    Args:
        parameters: What it moves.
        config: Names it.
        spread: Whether FSDP2 will spread the parameters.

    Returns:
        It.
    """
    options: dict[str, Any] = {} if config.optimizer in ("adam", "adam8bit") else {"weight_decay": config.weight_decay}
    if config.optimizer in _EIGHT_BIT:
        bitsandbytes = importlib.import_module("bitsandbytes")
        return getattr(bitsandbytes.optim, _EIGHT_BIT[config.optimizer])(
            list(parameters), lr=config.learning_rate, **options
        )
    fits = not (spread and config.optimizer == "sgd")  # torch has no fused SGD for weights that are spread
    options["fused"] = fits and all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return _OPTIMIZERS[config.optimizer](list(parameters), lr=config.learning_rate, **options)
