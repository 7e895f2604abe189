"""How to train, whatever the objective."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sfumato.attention import ATTENTION
from sfumato.settings import check_seed, check_types

__all__ = ["FREE_SETTINGS", "TrainingConfig"]

LARGEST_LEARNING_RATE = 1e36  # Adam divides it by 0.1 at first, and float32 ends at 3.4e38


@dataclass
class TrainingConfig:
    """How to train, whatever the objective.

    Attributes:
        steps: Optimiser steps.
        learning_rate: Peak learning rate.
        optimizer: ``"adam"``, ``"adamw"`` or ``"sgd"``; ``"adam8bit"`` and ``"adamw8bit"`` keep moments in 8 bits
            (bitsandbytes, on CUDA).
        weight_decay: Decoupled weight decay; ``"adamw"``, ``"adamw8bit"`` and ``"sgd"`` only.
        lr_schedule: ``"constant"`` or ``"cosine"`` (to zero at the last step).
        warmup_steps: Steps of linear warm-up.
        max_grad_norm: Clip the global gradient norm to this; None does not clip.
        gradient_accumulation_steps: Split each process's share of a batch into so many passes.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``; weights and optimiser stay float32.
        gradient_checkpointing: Recompute the denoiser's activations in the backward pass.
        attention: Who computes attention: ``"sdpa"`` (torch, by the kernel it chooses), its kernels ``"math"``,
            ``"flash"``, ``"efficient"`` or ``"cudnn"``, or ``"xformers"``.
        ema_decay: Keep an exponential moving average of the weights, which becomes the result; None keeps none.
        seed: Seeds the objective's data, noise and times.
        checkpoint_every: Steps between checkpoints; 0 keeps only the last.
        keep_checkpoints: How many checkpoints to keep.
        log_with: ``"tensorboard"`` or another accelerate tracker, or None.
    """

    steps: int = 1000
    learning_rate: float = 1e-5
    optimizer: str = field(default="adam", metadata={"choices": ["adam", "adamw", "sgd", "adam8bit", "adamw8bit"]})
    weight_decay: float = 0.0
    lr_schedule: str = field(default="constant", metadata={"choices": ["constant", "cosine"]})
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    gradient_accumulation_steps: int = 1
    mixed_precision: str = field(default="no", metadata={"choices": ["no", "bf16", "fp16"]})
    gradient_checkpointing: bool = False
    attention: str = field(default="sdpa", metadata={"choices": ATTENTION})
    ema_decay: float | None = None
    seed: int = 0
    checkpoint_every: int = 500
    keep_checkpoints: int = 1
    log_with: str | None = None

    def __post_init__(self) -> None:
        """Check values that would only fail after the long work has begun."""
        check_types(self)
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if not 0 < self.learning_rate <= LARGEST_LEARNING_RATE:
            raise ValueError(
                f"`learning_rate` must be a positive number of at most {LARGEST_LEARNING_RATE:g}, beyond which a step "
                f"overflows float32, got {self.learning_rate}."
            )
        if self.weight_decay and self.optimizer in ("adam", "adam8bit"):
            raise ValueError("`weight_decay` needs optimizer='adamw' or 'sgd': adam would mix it into the moments.")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"`max_grad_norm` must be above 0, or None for no clipping, got {self.max_grad_norm}.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must lie in [0, 1), or be None for no average, got {self.ema_decay}.")
        check_seed(self.seed)

    def learning_rate_at(self, step: int) -> float:
        """Give the learning rate of a step: a pure function, so resuming needs no scheduler state."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        decay = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.lr_schedule == "cosine" else 1.0
        return self.learning_rate * warm * decay


_LEAST = {
    "steps": 1, "weight_decay": 0, "warmup_steps": 0, "gradient_accumulation_steps": 1, "checkpoint_every": 0,
    "keep_checkpoints": 1,
}  # fmt: skip
FREE_SETTINGS = {
    "gradient_accumulation_steps", "gradient_checkpointing", "attention", "checkpoint_every", "keep_checkpoints",
    "log_with",
}  # fmt: skip
"""What a resumed run may change, for instance because memory did not suffice: it does not change the result."""
