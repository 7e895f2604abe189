"""Levels of noise: x = a p + b e, with p the predicted clean sample and e the slope that one-step solvers hold fixed.

A one-step solver (DDIM, Euler) goes from level t to level s by Phi(t -> s) = a_s p + b_s e. One notation for three
processes:

    "vp"    a = sqrt(A), b = sqrt(1 - A), e: the noise       betas; epsilon, sample or v prediction
    "flow"  a = 1, b = sigma, e: the velocity                rectified flow (Stable Diffusion 3, Flux)
    "edm"   a = 1, b = sigma, e = (x - D(x; sigma)) / sigma  Karras et al., arXiv 2206.00364

All of it is plain numbers on the host, known before a run starts, in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from .noise_schedule import checked_times, spaced_times

Given = Sequence[float] | Tensor | None


@dataclass(frozen=True)
class Level:
    """One level of noise, x = a p + b e, and what a model's output means there.

    Attributes:
        time: What the network is told.
        signal: a.
        noise: b.
        clean: Coefficients of p on x and on the model's output.
        slope: Coefficients of e on both.
        scale: The network is given `scale * x`.
    """

    time: float
    signal: float
    noise: float
    clean: tuple[float, float]
    slope: tuple[float, float]
    scale: float = 1.0

    def to(self, other: "Level") -> tuple[float, float]:
        """Coefficients, on x here and on the model's output here, of Phi(here -> other)."""
        x, output = (other.signal * p + other.noise * e for p, e in zip(self.clean, self.slope, strict=True))
        return x, output


def vp_levels(
    config: Any, alphas_cumprod: Tensor, steps: int | None, timesteps: Given, *, final_alpha: float, clean_time: int
) -> list[Level]:
    """Levels of a run of a model with betas, noisiest first, `steps + 1` of them.

    Args:
        config: A scheduler's, with stock names.
        alphas_cumprod: `(T,)`, float64.
        steps: Number of steps, or None where the times are given.
        timesteps: The times themselves, falling.
        final_alpha: A of the clean end.
        clean_time: What the network is told of the clean end, where an inversion begins.
    """
    given = spaced_times(config, steps or 0) if timesteps is None else torch.as_tensor(timesteps).tolist()
    times = checked_times(given, config.num_train_timesteps)
    alphas = alphas_cumprod[times].tolist()
    if alphas[0] == 0 and config.prediction_type == "epsilon":
        raise ValueError("A predicted noise says nothing where no signal is left (A = 0): start at a lower time.")
    kind = config.prediction_type
    levels = [_vp_level(kind, time, alpha) for time, alpha in zip(times, alphas, strict=True)]
    start = _vp_level(kind, clean_time, alphas_cumprod[clean_time].item())
    return [*levels, _clean_end(start, final_alpha)]


def _vp_level(kind: str, time: float, alpha: float) -> Level:
    signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
    if kind == "epsilon":
        clean, slope = (1 / signal, -noise / signal), (0.0, 1.0)
    elif kind == "sample":
        clean, slope = (0.0, 1.0), (1 / noise, -signal / noise)
    else:
        clean, slope = (signal, -noise), (noise, signal)
    return Level(time, signal, noise, clean, slope)


def _clean_end(start: Level, alpha: float) -> Level:
    """The last level of a run, at `alpha`; its network call, where an inversion begins, is that of `start`."""
    signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
    clean = ((1 - noise * start.slope[0]) / signal, -noise * start.slope[1] / signal)
    return Level(start.time, signal, noise, clean, start.slope)


def flow_levels(config: Any, steps: int | None, timesteps: Given, sigmas: Given, mu: float | None) -> list[Level]:
    """Levels of a run of a flow-matching model: those of stock `FlowMatchEulerDiscreteScheduler`."""
    names = (
        "num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len",
        "max_image_seq_len", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
        "time_shift_type",
    )  # fmt: skip
    stock = FlowMatchEulerDiscreteScheduler(**{name: config[name] for name in names})
    lists = [None if values is None else torch.as_tensor(values).tolist() for values in (timesteps, sigmas)]
    stock.set_timesteps(steps, timesteps=lists[0], sigmas=lists[1], mu=mu)
    levels = [
        Level(time, 1.0, sigma, (1.0, -sigma), (0.0, 1.0))
        for time, sigma in zip([*stock.timesteps.tolist(), 0.0], stock.sigmas.double().tolist(), strict=True)
    ]
    return _falling(levels)


def edm_levels(config: Any, steps: int | None, sigmas: Given) -> list[Level]:
    """Levels of a run of an EDM model: those of stock `EDMEulerScheduler`, or the noise levels given."""
    stock = EDMEulerScheduler(
        sigma_min=config.sigma_min, sigma_max=config.sigma_max, sigma_data=config.sigma_data, rho=config.rho,
        sigma_schedule=config.sigma_schedule, prediction_type=config.prediction_type,
    )  # fmt: skip
    if sigmas is None:
        stock.set_timesteps(steps)
        times, values = stock.timesteps.tolist(), stock.sigmas.double().tolist()[:-1]
    else:
        values = torch.as_tensor(sigmas).double().tolist()
        if not values or min(values) <= 0 or steps not in (None, len(values)):
            raise ValueError(f"`sigmas` must be above 0, one for each step and at least one, got {values}.")
        times = [math.log(sigma) / 4 for sigma in values]
    levels = [_edm_level(config, time, sigma) for time, sigma in zip(times, values, strict=True)]
    # The network knows no sigma = 0: an inversion begins with the slope that it gives at the lowest level.
    start = levels[-1]
    return _falling([*levels, Level(start.time, 1.0, 0.0, (1.0, 0.0), start.slope, start.scale)])


def _edm_level(config: Any, time: float, sigma: float) -> Level:
    data, total = config.sigma_data, math.hypot(sigma, config.sigma_data)
    skip, out = data**2 / total**2, sigma * data / total
    out = -out if config.prediction_type == "v_prediction" else out
    return Level(time, 1.0, sigma, (skip, out), ((1 - skip) / sigma, -out / sigma), 1 / total)


def _falling(levels: list[Level]) -> list[Level]:
    noises = [level.noise for level in levels]
    if any(a <= b for a, b in zip(noises, noises[1:], strict=False)):
        raise ValueError(f"The noise levels of a run must fall strictly, got {noises}.")
    return levels
