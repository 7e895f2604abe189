"""The DDIM map between noise levels, and what the solvers of more than one evaluation add: history, weights, grid.

Plain functions of tensors and numbers, and what a run remembers; [`TimeShiftScheduler`] imports them by relative
import. Notation: A = `alphas_cumprod`, x = sqrt(A) x0 + sqrt(1 - A) eps; a slope is an eps or a weighted mean of them.
The maps are written with as few passes over a sample as they need: two, and one new tensor.

Warm-up steps appear in a scheduler's `timesteps` once for each evaluation, as in [`PNDMScheduler`], whose Runge-Kutta
steps these are where T // N is even: N steps have N + 1 entries with "s_pndm", N + 9 with "f_pndm", where half-way
times may be fractional and `timesteps` is float32. A run that begins between the evaluations of a step (img2img counts
entries) goes on to the next entry by DDIM. Edits of the sample there reach no further than the slopes.

Pseudo linear multistep: Liu, Ren, Lin, Zhao, "Pseudo Numerical Methods for Diffusion Models on Manifolds", ICLR 2022,
arXiv 2202.09778, which put the slope of a classical method into the DDIM map. DPM-Solver++(2M): Lu, Zhou, Bao, Chen,
Li, Zhu, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", arXiv 2211.01095.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class WarmUp:
    """How a multistep solver takes its first steps, for want of a history."""

    steps: int  # how many steps
    places: tuple[float, ...]  # where in a step each of its evaluations lies, from 0 (its start) to 1 (its end)
    weights: tuple[float, ...]  # of the slopes found there


WARM_UPS = {
    "s_pndm": WarmUp(1, (0.0, 1.0), (1 / 2, 1 / 2)),  # improved Euler
    "f_pndm": WarmUp(3, (0.0, 0.5, 0.5, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),  # Runge-Kutta
}
_ORDERS = {"s_pndm": 2, "f_pndm": 4}  # slopes that a step uses, its own among them
_ADAMS_BASHFORTH = {  # by their number; weights of the newest first
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class Level(NamedTuple):
    """Noise level of a batch: scalar tensors, or one value per sample, broadcastable to the samples.

    Scalars are float64 where the device has it, which leaves samples in their own dtype.
    """

    alpha: Tensor  # A, in float64
    signal: Tensor  # sqrt(A), in the dtype of the samples if there is one per sample
    noise: Tensor  # sqrt(1 - A), too
    unit_slope: Tensor  # at slopes of eps on x from unit_slope - slack to unit_slope + slack ...
    slack: Tensor  # ... the data are of unit variance


@dataclass
class OpenStep:
    """A warm-up step that has not had all of its evaluations."""

    x: Tensor  # the sample at its start, (B, ...)
    level: Level  # there
    start: Tensor  # times (1,), or (B,) per sample
    goal: int | Tensor  # a tensor where it is shifted
    chosen: int | Tensor  # the time to report
    slopes: list[Tensor] = field(default_factory=list)  # (B, ...) each


@dataclass
class History:
    """What the steps of a run hand on to each other."""

    slopes: list[Tensor] = field(default_factory=list)  # (B, ...) each, the newest last
    last: tuple[Tensor, Tensor] | None = None  # x0 of the last evaluation, and A there
    open_step: OpenStep | None = None

    def evaluate(self, warm_up: WarmUp, stage: int, eps: Tensor) -> tuple[int | Tensor, Tensor]:
        """Add a slope to the open step: the time to go to from its start, and the slope to take there.

        Each state to evaluate at is reached by the slope found last; the end of the step, by all of them. Only the
        first slope is remembered for the steps to come.
        """
        step = self.open_step
        assert step is not None
        step.slopes.append(eps)
        if stage + 1 < len(warm_up.places):
            return step.start + warm_up.places[stage + 1] * (step.goal - step.start), eps  # half-way times, too
        self.slopes, self.open_step = [*self.slopes, step.slopes[0]], None
        return step.goal, weighted_sum(warm_up.weights, step.slopes)

    def extrapolate(
        self, solver: str, x: Tensor, x0: Tensor, eps: Tensor, start: Level, end: Level, plain: bool
    ) -> tuple[Tensor, Tensor]:
        """The x0 and eps with which the DDIM map from start to end is the solver's step; DDIM's own if `plain`."""
        if solver in _ORDERS:
            self.slopes = [*self.slopes[1 - _ORDERS[solver] :], eps]  # a short history lowers the order
            slope = weighted_sum(_ADAMS_BASHFORTH[len(self.slopes)], self.slopes[::-1])
            return clean_sample(x, slope, start), slope
        if solver == "dpmsolver++":
            last, self.last = self.last, (x0, start.alpha)
            if last is not None and not plain:
                x0 = second_order_x0(x0, *last, start.alpha, end.alpha)
                eps = noise_in(x, x0, start)
        return x0, eps


def evaluation_times(solver: str, times: Sequence[int]) -> tuple[list[float], list[tuple[int, int]]]:
    """Times at which the model is evaluated, and of each the index of its step and its own index in that step."""
    warm_up = WARM_UPS.get(solver, WarmUp(0, (0.0,), (1.0,)))
    seen, entries = [], []
    for step, (start, end) in enumerate(zip(times, [*times[1:], 0], strict=True)):
        warm = step < warm_up.steps and step + 1 < len(times)
        for stage, place in enumerate(warm_up.places if warm else (0.0,)):
            seen.append(start + place * (end - start))
            entries.append((step, stage))
    return seen, entries


def weighted_sum(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """Sum of slopes, `(B, ...)` each, by weight."""
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        total = total + weight * slope
    return total


def level_at(table: Tensor, times: Tensor, like: Tensor) -> Level:
    """Noise level at times `(1,)` or `(B,)`, for samples `like` these.

    Its values stand in a table, `(T + 1, 5)`, at the times -1 (clean data), 0, 1, ...; fractions are cut off.
    """
    # index_select, because indexing with a scalar tensor reads it back to the host
    rows = table.index_select(0, times.to(table.device, torch.int64) + 1)  # (1, 5) or (B, 5)
    if rows.shape[0] == 1:
        return Level(*rows.view(-1).unbind())
    level = Level(*rows.T.reshape(5, -1, *[1] * (like.ndim - 1)).unbind())
    return level._replace(signal=level.signal.to(like.dtype), noise=level.noise.to(like.dtype))


def predictions(kind: str, output: Tensor, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """The x0 and eps that the model's output for x stands for, `(B, ...)` each; `kind`: the prediction type."""
    if kind == "epsilon":
        return clean_sample(x, output, level), output
    if kind == "sample":
        return output, noise_in(x, output, level)
    x0 = torch.mul(x, level.signal).addcmul_(output, level.noise, value=-1)
    return x0, torch.mul(output, level.signal).addcmul_(x, level.noise)


def clean_sample(x: Tensor, eps: Tensor, level: Level) -> Tensor:
    """The x0 of x for a given eps."""
    return torch.addcmul(x, eps, level.noise, value=-1).div_(level.signal)


def noise_in(x: Tensor, x0: Tensor, level: Level) -> Tensor:
    """The eps of x for a given x0."""
    return torch.addcmul(x, x0, level.signal, value=-1).div_(level.noise)


def adjusted(
    config: Any, x0: Tensor, eps: Tensor, x: Tensor, level: Level, step: int, new_eps: bool | None
) -> tuple[Tensor, Tensor]:
    """Predictions of a step for x, `(B, ...)` each, with eps scaled and x0 clipped as the config says.

    Where x0 is clipped, eps stays as it is, or is made to agree with it if `new_eps`; None: as mode and solver do.
    """
    scale = epsilon_scale(config, step)
    if scale != 1:
        eps = eps / scale
        x0 = clean_sample(x, eps, level)
    if config.thresholding:  # arXiv 2205.11487, section 2.3
        bound = torch.quantile(x0.abs().flatten(1), config.dynamic_thresholding_ratio, dim=1)
        bound = bound.clamp(min=1).clamp(max=config.sample_max_value).reshape(-1, *[1] * (x0.ndim - 1))
        x0 = x0.clamp(-bound, bound) / bound
    elif config.clip_sample:
        x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
    if new_eps is None:
        multistep = config.solver not in ("ddim", "ddpm") and (config.clip_sample or config.thresholding)
        new_eps = multistep or (config.released and config.mode == "adm")
    return x0, noise_in(x, x0, level) if new_eps else eps


def epsilon_scale(config: Any, step: int) -> float:
    """What eps is divided by in a step i = 0, 1, ...: the other cure of exposure bias, alone or with shifted times.

    Ning, Li, Su, Salah, Ertugrul, "Elucidating the Exposure Bias in Diffusion Models", ICLR 2024, arXiv 2308.15321.
    """
    return config.epsilon_scale + config.epsilon_scale_slope * step


def checked_eta(solver: str, eta: float) -> float:
    """The eta to use; a ValueError for what the solver does not take."""
    if not 0 <= eta <= 1:
        raise ValueError(f"`eta` must lie in [0, 1] (0: DDIM, 1: DDPM), got {eta}.")
    if eta > 0 and solver not in ("ddim", "ddpm"):
        raise ValueError(f"Solver {solver!r} takes no noise, got `eta` {eta}: use 'ddim' or 'ddpm'.")
    return 1.0 if solver == "ddpm" and eta == 0 else eta


def transfer(x0: Tensor, eps: Tensor, start: Level, end: Level, eta: float = 0.0, z: Tensor | None = None) -> Tensor:
    """The DDIM map (arXiv 2010.02502, eq. 12 and 16) from a level to another, with noise `eta` of `z`."""
    if eta == 0 or z is None:
        return torch.mul(x0, end.signal).addcmul_(eps, end.noise)
    gain = (end.alpha - start.alpha).clamp(min=0) / end.alpha.clamp(min=torch.finfo(end.alpha.dtype).tiny)
    variance = eta**2 * gain * (1 - end.alpha) / (1 - start.alpha)
    rest = (1 - end.alpha - variance).clamp(min=0).sqrt()
    prev = torch.mul(x0, end.signal).addcmul_(eps, rest.to(eps.dtype))
    return prev.addcmul_(z.to(eps.dtype), variance.sqrt().to(eps.dtype))


def move(x: Tensor, slope: Tensor, start: Level, end: Level) -> Tensor:
    """The DDIM map of x from a level to another with a slope for eps."""
    return transfer(clean_sample(x, slope, start), slope, start, end)


def second_order_x0(x0: Tensor, last_x0: Tensor, last_alpha: Tensor, a_t: Tensor, a_s: Tensor) -> Tensor:
    """Clean sample that makes the DDIM map a step of DPM-Solver++(2M): x0 + (x0 - last_x0) h / (2 h_last).

    h and h_last are the increases of lambda = log(sqrt(A) / sqrt(1 - A)) in this step and the last one. Where shifted
    times take one of them backwards, and where this one goes to clean data (h infinite), nothing can be extrapolated:
    x0 stays.
    """
    before, now, after = (0.5 * (alpha.log() - (1 - alpha).log()) for alpha in (last_alpha, a_t, a_s))
    h, h_last = after - now, now - before
    weight = torch.where((h > 0) & (h_last > 0) & (a_s < 1), h / (2 * h_last), torch.zeros_like(h))
    return x0 + weight * (x0 - last_x0)


def dpm_times(config: Any, steps: int) -> list[int]:
    """Times of a run of `steps` steps, falling, spaced as stock DPM-Solver does it: one step more, without its end."""
    count = config.num_train_timesteps
    if config.timestep_spacing == "linspace":
        times = np.linspace(0, count - 1, steps + 1).round()[1:]
    elif config.timestep_spacing == "leading":
        times = np.arange(1, steps + 1) * (count // (steps + 1)) + config.steps_offset
    else:
        times = np.arange(count, 0, -count / steps)[:steps].round()[::-1] - 1  # which rounds halves as stock does
    return [int(time) for time in times[::-1]]


def check_run(config: Any, times: Sequence[int], first_alpha: float) -> None:
    """Raise a ValueError if the solver or the scale of eps cannot do with these times, which begin at this A."""
    warm_up, steps = WARM_UPS.get(config.solver), len(times)
    if warm_up is not None and steps <= warm_up.steps:
        raise ValueError(
            f"Solver {config.solver!r} needs at least {warm_up.steps + 1} steps ({warm_up.steps} to warm up), got"
            f" {steps}: take more steps, or solver 'ddim'."
        )
    scales = [epsilon_scale(config, 0), epsilon_scale(config, steps - 1)]
    if not min(scales) > 0:
        raise ValueError(f"`epsilon_scale` must stay above 0 over the run, got {scales[0]} to {scales[1]}.")
    if (warm_up is not None or scales != [1, 1]) and not first_alpha > 0:
        raise ValueError(
            f"At time {times[0]} no signal is left (A = 0), so eps does not tell x0: use solver 'ddim' or"
            " 'dpmsolver++' without scaling eps, or `timestep_spacing='leading'`."
        )
