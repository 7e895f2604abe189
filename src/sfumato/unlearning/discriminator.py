"""A patch discriminator on latents, and its own Adam, whose every number is a tensor that a checkpoint can keep."""

from __future__ import annotations

import torch

from sfumato.randomness import generator_for

__all__ = ["new_adam", "patch_discriminator"]

STAGES, WIDTH = 4, 64  # 64x64 latents are halved four times, from 64 channels to 512
CHANNELS_PER_GROUP = 16


def patch_discriminator(shape: tuple[int, int, int], norm: str, key: tuple[int, ...]) -> torch.nn.Sequential:
    """Make a PatchGAN (Isola et al., CVPR 2017, arXiv 1611.07004) for latents: one logit for each overlapping patch.

    4x4 convolutions of stride 2, the first without a norm, leaky ReLUs of slope 0.2, and a last 4x4 convolution of
    stride 1. There are four halvings, fewer for latents that would end below 2x2: 3x3 logits for 64x64 latents, one
    logit for 8x8 and for 4x4.

    Args:
        shape: Channels, height and width of a latent.
        norm: ``"batch"`` always takes the statistics of the batch that it is shown, as a discriminator that never
            leaves training mode does, and so keeps none. ``"group"`` looks at each latent alone, so that a batch can
            be shared among processes.
        key: Seeds the weights, normal with standard deviation 0.02.

    Returns:
        From latents ``(B, C, H, W)`` to logits ``(B, 1, h, w)``.

    Raises:
        ValueError: If the latents are smaller than 4x4.
    """
    channels, height, width = shape
    side = min(height, width)
    if side < 4:
        raise ValueError(f"The discriminator needs latents of at least 4x4, got {height}x{width}.")
    layers: list[torch.nn.Module] = []
    for stage in range(min(STAGES, side.bit_length() - 2)):
        layers.append(torch.nn.Conv2d(channels, WIDTH << stage, 4, stride=2, padding=1))
        channels = WIDTH << stage
        if stage:
            layers.append(_norm(norm, channels))
        layers.append(torch.nn.LeakyReLU(0.2))
    made = torch.nn.Sequential(*layers, torch.nn.Conv2d(channels, 1, 4, stride=1, padding=1))
    for number, (name, parameter) in enumerate(made.named_parameters()):
        if parameter.ndim == 4:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator_for(*key, number))
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return made


def _norm(kind: str, channels: int) -> torch.nn.Module:
    if kind == "batch":
        return torch.nn.BatchNorm2d(channels, track_running_stats=False)
    return torch.nn.GroupNorm(channels // CHANNELS_PER_GROUP, channels)


def new_adam(module: torch.nn.Module, learning_rate: float) -> tuple[torch.optim.Adam, dict[str, torch.Tensor]]:
    """Make an Adam (betas 0.5 and 0.999, as adversarial training has them) whose state is there from the start.

    Args:
        module: What it trains.
        learning_rate: Its learning rate.

    Returns:
        The optimiser, and its state by name: the very tensors that it works on, to be saved and written into.
    """
    optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate, betas=(0.5, 0.999))
    state: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        moments = {
            "step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter),
        }  # fmt: skip
        optimizer.state[parameter] = moments
        state |= {f"{name}.{kind}": value for kind, value in moments.items()}
    return optimizer, state
