"""The settings of residual denoising diffusion: weights of its two schedules, and which go together.

Liu et al., arXiv 2308.13712: P(x, a) there are the increasing weights linspace(0, 1, T)^a, P(1 - x, a) the decreasing.
"""

from typing import Any

import torch
from torch import Tensor

from .noise_schedule import BETA_SCHEDULES, PREDICTION_TYPES, SPACINGS, check_choices

WEIGHTS = ("increased", "decreased", "average", "normal")
TWO_HEADS = ("pred_res_noise", "pred_res_add_noise", "pred_x0_noise", "pred_x0_add_noise")
OBJECTIVES = (*TWO_HEADS, "pred_noise", "pred_res")


def has_betas(config: Any) -> bool:
    """Whether the noise's schedule is one of betas."""
    return config.trained_betas is not None or config.beta_schedule in BETA_SCHEDULES


def check_settings(config: Any) -> None:
    """Raise a ValueError for a config that has no meaning."""
    check_choices(
        config,
        beta_schedule=(*WEIGHTS, *BETA_SCHEDULES),
        alpha_schedule=(*WEIGHTS, None),
        prediction_type=(*OBJECTIVES, *PREDICTION_TYPES),
        timestep_spacing=("truncated", *SPACINGS),
    )
    count = config.num_train_timesteps
    if not isinstance(count, int) or count < 2:
        raise ValueError(f"`num_train_timesteps` must be a whole number from 2 on, got {count!r}.")
    for name in ("alpha_ratio", "beta_ratio", "clip_sample_range"):
        if config[name] is not None and not 0 < config[name] < float("inf"):
            raise ValueError(f"`{name}` must be a number above 0, got {config[name]}.")
    if not 0 < config.sum_scale <= 1:
        raise ValueError(f"`sum_scale` is a variance in (0, 1], got {config.sum_scale}.")
    if has_betas(config):
        return
    if config.alpha_schedule is None:
        raise ValueError(
            f"`alpha_schedule=None` takes the residual's schedule from betas, and `beta_schedule` is"
            f" {config.beta_schedule!r}: name one of {', '.join(map(repr, WEIGHTS))}."
        )
    if config.prediction_type in PREDICTION_TYPES:
        raise ValueError(
            f"`prediction_type` {config.prediction_type!r} is that of a model of DDPM, which has betas, and"
            f" `beta_schedule` is {config.beta_schedule!r}: take 'pred_noise' or another of RDDM's, or make the"
            " scheduler by `from_config` of the model's own."
        )


def weights_of(kind: str, ratio: float | None, count: int) -> Tensor:
    """Weights of a schedule's steps, `(T,)`, float64, of sum 1."""
    if kind == "average":
        weights = torch.ones(count, dtype=torch.float64)
    elif kind == "normal":
        weights = (-(torch.linspace(-3, 3, count, dtype=torch.float64) ** 2) / 2).exp()
    else:
        rising = torch.linspace(0, 1, count, dtype=torch.float64) ** (ratio or 1)
        weights = torch.arange(1, count + 1, dtype=torch.float64) if ratio is None else rising
        weights = weights.flip(0) if kind == "decreased" else weights
    return weights / weights.sum()
