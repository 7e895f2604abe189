"""What the samplers share: noise schedules, time grids, what a prediction stands for, and which step a time means.

Plain functions of a scheduler's config and of tensors; the sampler files import them by relative import, which loading
from the Hub carries along. Tables are float64. Notation: A = `alphas_cumprod`, x = sqrt(A) x0 + sqrt(1 - A) eps.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from inspect import signature
from numbers import Integral
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from torch import Tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "linspace", "trailing")
STOCK = [e.name for e in KarrasDiffusionSchedulers] + ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"]


def check_choices(config: Any, **allowed: Sequence[Any]) -> None:
    """Raise a ValueError for the first entry of a config that is none of those allowed for its name."""
    for name, values in allowed.items():
        if config[name] not in values:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, values))}, got {config[name]!r}.")


def require_fraction(name: str, value: float) -> None:
    """Raise a ValueError unless a value lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` must lie in [0, 1], got {value}.")


def require_output_like(model_output: Tensor, sample: Tensor) -> None:
    """Raise a ValueError unless a prediction has the sample's shape."""
    if model_output.shape != sample.shape:
        raise ValueError(
            f"`model_output` must have the shape of `sample`, {tuple(sample.shape)}, got {tuple(model_output.shape)}:"
            " of a model that predicts its variance too, pass the first half of the channels."
        )


def process_of(config: Mapping[str, Any]) -> str:
    """Tell from another scheduler's config which process its model was trained on: "vp", "flow" or "edm".

    A config that was never saved does not hold its class's name, so this goes by the settings that it has.

    Raises:
        ValueError: If it is none of these, or has a setting that changes the process.
    """
    if "process" in config:  # one of ours
        return str(config["process"])
    keys = {key for key in config if not key.startswith("_")}
    name = str(config.get("_class_name") or "this config")
    moved = [key for key in ("invert_sigmas", "stochastic_sampling", "snr_shift_scale") if config.get(key)]
    if config.get("timestep_type") == "continuous":
        moved.append("timestep_type")
    stock = getattr(diffusers, name, None)
    foreign = stock is not None and not name.startswith(("FlowMatch", "EDM")) and not _has_betas(stock)
    if moved or foreign:
        setting = f" with {moved[0]}={config[moved[0]]!r}" if moved else ""
        raise _foreign(name + setting)
    if "beta_start" in keys:
        flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
        return "flow" if flow else "vp"
    if {"sigma_data", "rho", "sigma_schedule"} <= keys or name.startswith("EDM"):
        return "edm"
    if "shift" in keys and (name.startswith("FlowMatch") or keys <= _FLOW_SETTINGS):
        return "flow"
    if keys:
        raise _foreign(name)
    return "vp"


_FLOW_SETTINGS = {*signature(diffusers.FlowMatchEulerDiscreteScheduler).parameters, "scale_factors", "upscale_mode"}


def _has_betas(stock: Any) -> bool:
    return "beta_start" in signature(stock).parameters


def _foreign(name: str) -> ValueError:
    return ValueError(
        f"The noise schedule of {name} is not one of betas, flow matching or EDM: keep the scheduler that came with"
        " the model."
    )


def settings_for(cls: type, config: Any) -> Any:
    """Give a config as it is, or, if it is that of another scheduler of ours, what stock schedulers have of it.

    Two of ours may use one name for two things (`solver`, `released`), and what is not meant for a class must not
    linger in its config either.
    """
    known = signature(cls).parameters
    if not isinstance(config, Mapping) or not any(key in config and key not in known for key in _OURS):
        return config
    return stock_settings(config)


def stock_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give what stock schedulers have of a config: the noise schedule and its grid of times."""
    return {key: value for key, value in config.items() if key.startswith("_") or key in _shared_settings()}


# what tells a config of ours, since one that was never saved does not hold its class's name
_OURS = (
    "gamma", "mixing_coeff", "num_iterations", "window", "original_inference_steps", "exact", "eta", "released",
    "alpha_schedule", "boost",
)  # fmt: skip


@cache
def _shared_settings() -> frozenset[str]:
    return frozenset({"process"}.union(*(signature(getattr(diffusers, name)).parameters for name in STOCK)))


def require_betas(cls: type, config: Any) -> None:
    """Raise a ValueError if a config is that of a flow-matching or EDM scheduler, whose model has no betas."""
    if isinstance(config, Mapping) and process_of(config) != "vp":
        name = config.get("_class_name", "unnamed")
        raise ValueError(
            f"{cls.__name__} needs a schedule of betas (epsilon, sample or v prediction), got a flow-matching"
            f" config or EDM's ({name}): keep the scheduler that came with the model."
        )


def noise_schedule(config: Any) -> tuple[Tensor, Tensor]:
    """Betas and `alphas_cumprod` of a config with stock names, `(T,)` each, float64 on the CPU."""
    count = config.num_train_timesteps
    if config.trained_betas is not None:
        betas = np.array(config.trained_betas, dtype=np.float64)
        if betas.shape != (count,):
            raise ValueError(
                f"`trained_betas` must hold `num_train_timesteps` = {count} numbers, got shape {betas.shape}."
            )
    elif config.beta_schedule == "linear":
        betas = np.linspace(config.beta_start, config.beta_end, count)
    elif config.beta_schedule == "scaled_linear":
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, count) ** 2
    else:
        cosine = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - cosine[1:] / cosine[:-1], 0.999)
    alphas_cumprod = np.cumprod(1 - betas)
    if config.rescale_betas_zero_snr:  # arXiv 2305.08891
        root = np.sqrt(alphas_cumprod)
        alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
    return torch.from_numpy(betas), torch.from_numpy(alphas_cumprod)


def require_steps(steps: int, count: int) -> None:
    """Raise a ValueError unless a run of so many steps fits a training schedule of `count`."""
    if not isinstance(steps, Integral) or not 1 <= steps <= count:
        limit = f"[1, {count}] (`num_train_timesteps`)"
        raise ValueError(f"`num_inference_steps` must be a whole number in {limit}, got {steps!r}.")


def spaced_times(config: Any, steps: int) -> list[int]:
    """Times of a run of `steps` steps, falling, spaced as stock schedulers do it."""
    count = config.num_train_timesteps
    require_steps(steps, count)
    if config.timestep_spacing == "leading":
        times = np.arange(steps) * (count // steps) + config.steps_offset
    elif config.timestep_spacing == "linspace":
        times = np.linspace(0, count - 1, steps).round()
    else:
        times = np.round(np.arange(count, 0, -count / steps))[:steps][::-1] - 1  # with stock's rounding errors
    return [int(time) for time in times[::-1]]


def checked_times(times: Sequence[float], count: int) -> list[int]:
    """Give the times of a run as integers; a ValueError says what is wrong with them (`count`: training steps)."""
    if any(isinstance(time, list) for time in times):
        raise ValueError("The times of a run must be a flat list or a tensor of shape (steps,).")
    if not times or any(time % 1 for time in times) or any(a <= b for a, b in zip(times, times[1:], strict=False)):
        raise ValueError(f"The times of a run must be whole, fall strictly and be at least one, got {_short(times)}.")
    if times[0] >= count or times[-1] < 0:
        raise ValueError(
            f"Times must lie in [0, {count - 1}], got {_short(times)}: take fewer steps or another `steps_offset`."
        )
    return [int(time) for time in times]


def _short(times: Sequence[float]) -> str:
    """Print at most six times."""
    return str([*times]) if len(times) <= 6 else f"[{', '.join(map(str, (*times[:3], '...', *times[-2:])))}]"


def split_prediction(kind: str, output: Tensor, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Clean sample and noise that a model's output stands for, `x = sqrt(A) x0 + sqrt(1 - A) eps`.

    Args:
        kind: Prediction type: `"epsilon"`, `"sample"` or `"v_prediction"`.
        output: The model's output, `(B, ...)`.
        x: Its input, of the same shape.
        alpha: A at its time, broadcastable.
    """
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    if kind == "epsilon":
        return (x - noise * output) / signal, output
    if kind == "sample":
        return output, (x - signal * output) / noise
    return signal * x - noise * output, signal * output + noise * x


def entry_of(timestep: Any, timesteps: Tensor) -> int | None:
    """Index in `timesteps` of the entry that `timestep` is a view of; None if it is not one.

    Pipelines iterate over views of the schedule, so an entry's address tells its index, without reading a value back
    from the device, and also where a time occurs twice.
    """
    if not isinstance(timestep, Tensor) or timestep.device != timesteps.device or timestep.dtype != timesteps.dtype:
        return None
    if timestep.device.type == "meta" or timestep.numel() != 1:
        return None
    offset, rest = divmod(timestep.data_ptr() - timesteps.data_ptr(), timesteps.element_size())
    return offset if rest == 0 and 0 <= offset < len(timesteps) else None


def state_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
