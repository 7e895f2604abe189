"""Shifted times: what a sample's variance says of its time, and how a denoiser is given one time per sample.

Plain functions and a hook; [`TimeShiftScheduler`] imports them by relative import. Equations: its module docstring.

Of the authors' programs, TS-DPM's on DPM-Solver and DEIS are not provided: their grids and units of time are not known
here well enough to vouch for a port.
"""

import inspect
import math
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor

PROGRAMS = {  # the released programs and their solvers
    "pnm": ("ddim", "ddpm", "s_pndm", "f_pndm"),
    "adm": ("ddim", "ddpm"),
    "pndm": ("ddim", "s_pndm", "f_pndm"),
}
ADVICE = (
    "data of unit variance keeps its variance whatever noise is mixed in, so it cannot tell the time. Use this sampler"
    " in pixel space, where the data variance is well below 1, and another one on the latents of Stable Diffusion"
    " (`data_variance=1.0` keeps to the nominal times from the start)."
)
MISSED = (
    "`step` was given times other than those in `scheduler.timesteps` and took them for the ones the model saw, so"
    " shifts were lost: iterate over `scheduler.timesteps` itself, not over a copy."
)
_NAME = "sfumato_sample_times"


def released_times(mode: str, count: int, steps: int) -> list[int]:
    """Times of a released program, falling; `count`: the training steps T, `steps`: N.

    "pnm": 1, 1 + T // N, ... without the largest (N = 10: 801, 701, ..., 1). "adm": N times 0, d, 2d, ..., d the
    smallest stride that gives exactly N. "pndm": 0, T // N, ...
    """
    stride = -(-count // steps) if mode == "adm" else count // steps
    times = list(range(0, count, stride))
    if mode == "adm" and len(times) != steps:
        raise ValueError(f"The released adm grid cannot have {steps} steps; the nearest has {len(times)}.")
    return [time + 1 for time in times[-2::-1]] if mode == "pnm" else times[::-1]


def check_shifts(config: Any) -> None:
    """Raise a ValueError for a window, cutoff, data variance or released program that cannot be."""
    count = config.num_train_timesteps
    if not isinstance(config.window, int) or config.window < 0:
        raise ValueError(f"`window` must be a whole number of training steps >= 0, got {config.window!r}.")
    if config.window > max(count, 20):  # the default must do for any schedule
        limit = f"{count} training steps (`num_train_timesteps`)"
        raise ValueError(f"`window` must not reach beyond the {limit}, got {config.window}.")
    if config.cutoff is not None and not 0 <= config.cutoff <= count:
        limit = f"[0, {count}] (`num_train_timesteps`)"
        raise ValueError(f"`cutoff` must lie in {limit} or be None, got {config.cutoff!r}.")
    if config.data_variance is not None and not config.data_variance >= 0:
        raise ValueError(f"`data_variance` must be >= 0 or None, got {config.data_variance!r}.")
    if config.released and config.mode == "paper":
        raise ValueError(
            "`released=True` needs mode 'pnm' or 'adm', or 'pndm' for PNDM itself: no program of the paper's own mode"
            " exists."
        )
    if config.mode == "pndm" and not config.released:
        raise ValueError("Mode 'pndm' is a released program: pass `released=True`, or another mode and `window=0`")
    if config.released and config.solver not in PROGRAMS[config.mode]:
        known = ", ".join(map(repr, PROGRAMS[config.mode]))
        raise ValueError(f"The program of mode {config.mode!r} has the solvers {known}, got {config.solver!r}.")


def known_silent(config: Any) -> bool:
    """Whether the data variance is given, and too near 1 for the variance of a sample to tell the time."""
    return config.data_variance is not None and config.data_variance >= 0.95


def may_shift(config: Any, nominal: int) -> bool:
    """Whether the config lets a step at this nominal time be shifted."""
    cutoff = 3 * config.num_train_timesteps // 10 if config.cutoff is None else config.cutoff
    return config.window > 1 and nominal > cutoff and config.mode != "pndm" and not known_silent(config)


def variance_bounds(config: Any, alphas: Tensor) -> Tensor:
    """The variances, `(T - 1,)`, rising, at which the time whose v fits best goes on from 0 to 1, from 1 to 2, ..."""
    noise = alphas.flip(0) if config.released and config.mode == "adm" else 1 - alphas
    expected = noise + (config.data_variance or 0.0) * (1 - noise)  # v, (T,)
    return (expected[1:] + expected[:-1]) / 2


def search_range(config: Any, centre: int, last: int) -> tuple[int, int]:
    """First and last time of the window around `centre`; `last`: the latest time with any signal."""
    half, released_adm = config.window // 2, config.released and config.mode == "adm"
    if released_adm and config.cutoff == 0:
        return centre, centre  # the program makes no choice there, but applies its offset
    if released_adm and centre <= half:
        return 0, min(config.window, last)
    return max(centre - half, 0), min(centre + half, last)


def best_times(config: Any, x: Tensor, bounds: Tensor, centre: int, last: int, joint: bool) -> Tensor:
    """Time in the window around `centre` whose v fits the variance of each sample best, the earliest of equals.

    As v rises with the time, it is the best of all times, cut off at the ends of the window.

    Args:
        config: The scheduler's.
        x: Samples, `(B, ...)`.
        bounds: What `variance_bounds` gives.
        centre: Middle of the window.
        last: The latest time with any signal.
        joint: Whether to find the one time of the batch, with the least squared mismatch summed over it, which is
            the one that fits the mean of the variances best.

    Returns:
        `(B,)`, or `(1,)` if `joint`.
    """
    x = centred(x)
    variance = (x.square_().sum(1) / (x.shape[1] - 1)).to(bounds.dtype)  # (B,)
    if joint and x.shape[0] > 1:
        variance = variance.mean(0, keepdim=True)
    return torch.searchsorted(bounds, variance).clamp_(*search_range(config, centre, last))


def centred(x: Tensor) -> Tensor:
    """The values of each sample less their mean, `(B, values)`: with its sum of squares, as exact as `torch.var`.

    And up to twenty times as fast: over the rows of a matrix, that takes one value at a time on a CPU.
    """
    x = x.flatten(1)
    return torch.sub(x, x.sum(1, keepdim=True), alpha=1 / x.shape[1])


def slope_of(eps: Tensor, x: Tensor, level: Any, per_sample: bool, least: float | None) -> tuple[Tensor, Tensor]:
    """Slope of the network's eps on x, and whether it tells of data whose variance leaves the criterion no meaning.

    A network trained by least squares has E<eps, x> = sqrt(1 - A) n, whatever the data, so the slope of eps on x tells
    the variance V = sqrt(1 - A) / slope that the network expects at its time, and V = 1 - (1 - s^2) A. The variance of
    the states would be a poor witness: exposure bias and the solver's own error disturb it (ten steps shrink
    unit-variance data to 0.7), and its noise is carried along the run, so that steps do not average it out. The same
    holds for the errors of V (see `least_alpha`): the last estimate, at the largest A, is the best one. All of it
    stays on the device.

    Args:
        eps: The network's epsilon, `(B, ...)`.
        x: States, of the same shape.
        level: Their noise level: `alpha`, and what `unit_slopes` gives as `unit_slope` and `slack`.
        per_sample: Whether each sample has its own slope, or the batch one.
        least: What `least_alpha` gives, unless A is known to be above it.

    Returns:
        Two tensors, scalar or, `per_sample`, `(B,)`.
    """
    values = level.alpha, level.unit_slope, level.slack
    if level.alpha.ndim > 0:  # one per sample
        values = tuple(value.flatten() if per_sample else value.mean() for value in values)
    alpha, unit, slack = values
    x, eps = (centred(x), eps.flatten(1)) if per_sample else (centred(x).flatten(), eps.flatten())
    slope = torch.linalg.vecdot(x, eps) / torch.linalg.vecdot(x, x)
    silent = (slope - unit).abs_() < slack
    return slope, silent if least is None else silent & (alpha > least)


def unit_slopes(alphas: Tensor) -> tuple[Tensor, Tensor]:
    """Range of slopes that tell of data of unit variance: its middle and half of its width, shaped as A.

    From s^2 = 2, a wide bound, because guidance exaggerates s^2, to s^2 = 0.8.
    """
    low, high = ((1 - alphas).sqrt() / (1 + excess * alphas) for excess in (1, -0.2))
    return (low + high) / 2, (high - low) / 2


def data_variance(slope: Tensor, level: Any) -> Tensor:
    """The s^2 of a slope, shaped as it: a scalar, or `(B,)`."""
    alpha = level.alpha.flatten() if slope.ndim > 0 else level.alpha.mean()
    return ((1 - alpha).sqrt() / slope.clamp(min=0.01) - 1) / alpha + 1


def least_alpha(x: Tensor, per_sample: bool) -> float:
    """A above which the samples' s^2 is told to 0.1, so that it may be believed.

    Its error is that of V over A; V is taken to be off by 0.005 for the network and sqrt(A / n) for n values.
    """
    count = x.numel() // (x.shape[0] if per_sample else 1)
    return (5 * (count**-0.5 + math.sqrt(1 / count + 0.002))) ** 2


def mean_time(times: Tensor, dtype: torch.dtype) -> Tensor:
    """One time, `(1,)`, for those who read one: the mean of times `(B,)` or `(1,)`."""
    if times.shape[0] == 1:
        return times
    mean = times.to(torch.float32).mean(0, keepdim=True)
    return mean if dtype.is_floating_point else mean.round()


class SampleTimesHook(ModelHook):
    """Replaces the denoiser's `timestep` by the times that a scheduler chose, sample by sample.

    Args:
        scheduler: An object whose `sample_timesteps` is a tensor `(B,)`, or None where the pipeline's times hold.
    """

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.scheduler = scheduler
        self.parameters: list[str] = []

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        """Find the place of `timestep` among the denoiser's arguments."""
        self.parameters = _parameters(module)
        return module

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        """Put the scheduler's times in place of the pipeline's, once for each copy of the batch."""
        times = self.scheduler.sample_timesteps
        if times is None:
            return args, kwargs
        size = len(args[0] if args else kwargs[self.parameters[0]])
        if size % len(times):
            raise ValueError(
                f"The denoiser was given {size} samples, but the scheduler chose times for {len(times)}: call"
                " `set_timesteps` before a run with another batch."
            )
        times = times.repeat(size // len(times))  # (2B,) under classifier-free guidance, which stacks whole batches
        place = self.parameters.index("timestep")
        if place < len(args):
            return (*args[:place], times, *args[place + 1 :]), kwargs
        return args, {**kwargs, "timestep": times}


def hook_denoiser(denoiser: torch.nn.Module, scheduler: Any) -> SampleTimesHook:
    """Register a [`SampleTimesHook`]; a ValueError says why a denoiser cannot have it."""
    if "timestep" not in _parameters(denoiser):
        raise ValueError(f"{type(denoiser).__name__} takes no `timestep`, so it cannot be given one per sample.")
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    if registry.get_hook(_NAME) is not None:
        raise ValueError("The denoiser has its times from a scheduler already: call what `shift_per_sample` returned.")
    hook = SampleTimesHook(scheduler)
    registry.register_hook(hook, _NAME)
    return hook


def unhook_denoiser(denoiser: torch.nn.Module, hook: Any) -> None:
    """Remove a hook if it is still there."""
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    if registry.get_hook(_NAME) is hook:
        registry.remove_hook(_NAME, recurse=False)


def _parameters(denoiser: torch.nn.Module) -> list[str]:
    """Names of the arguments of a denoiser's `forward`, as its class defines it: hooks and compilation wrap it."""
    module = getattr(denoiser, "_orig_mod", denoiser)
    return [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
