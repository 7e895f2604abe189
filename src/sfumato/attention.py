"""Which kernel computes a model's attention, for as long as it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["ATTENTION", "attention", "check_attention"]

_KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
ATTENTION = ["sdpa", *_KERNELS, "xformers"]
"""torch's scaled dot product attention by whatever kernel it chooses, or by one of its kernels, or xFormers."""


def check_attention(kind: str, model: torch.nn.Module, device: torch.device) -> None:
    """Refuse, before the long work, attention that can't be had.

    Args:
        kind: One of `ATTENTION`.
        model: The network.
        device: Where it will be.

    Raises:
        ImportError: If xFormers is wanted, but not installed.
        ValueError: If it, or a kernel, does not work for the model or the device.
    """
    if kind in ("efficient", "cudnn") and device.type == "cpu":
        raise ValueError(f"attention={kind!r} needs an accelerator; on the CPU choose 'sdpa', 'flash' or 'math'.")
    if kind != "xformers":
        return
    if find_spec("xformers") is None:
        raise ImportError("attention='xformers' needs xFormers: pip install xformers.")
    if device.type != "cuda":
        raise ValueError(f"attention='xformers' needs a CUDA device, not {device}; choose 'sdpa'.")
    if not hasattr(model, "enable_xformers_memory_efficient_attention"):
        raise ValueError(f"{type(model).__name__} has no attention by xFormers; choose attention='sdpa'.")


@contextmanager
def attention(kind: str, model: torch.nn.Module) -> Iterator[None]:
    """Let a kernel compute attention for a while: a kernel of torch's all attention, xFormers that of the model.

    Args:
        kind: One of `ATTENTION`.
        model: The network.
    """
    if kind in _KERNELS:
        with sdpa_kernel(_KERNELS[kind]):
            yield
        return
    network: Any = model
    if kind == "xformers":
        network.enable_xformers_memory_efficient_attention()
    try:
        yield
    finally:
        if kind == "xformers":
            network.disable_xformers_memory_efficient_attention()
