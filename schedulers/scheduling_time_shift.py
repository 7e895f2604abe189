"""Time-shift sampler: steps taken at the time that the sample's own variance tells.

Li, Qu, Yao, Sun, Moens, "Alleviating Exposure Bias in Diffusion Models through Sampling with Shifted Time Steps",
ICLR 2024, arXiv 2305.15583. A sampled state x is not distributed as the noised images of training are; its variance
(unbiased, over all values of a sample) betrays the time s whose distribution it fits best. With A = `alphas_cumprod`,
half = window // 2, and while the nominal time is above `cutoff`:

    s = argmin |var(x) - v(tau)|  over  |tau - centre| <= half,   v(tau) = 1 - A[tau]                      (published)
                                                                  v(tau) = 1 - (1 - data_variance) A[tau]  (corrected)
    x <- sqrt(A[j]) x0(x, eps, A[i]) + sqrt(1 - A[j] - sigma^2) eps + sigma z     takes x from time i to time j,
    sigma^2 = eta^2 (1 - A[j]) / (1 - A[i]) (1 - A[i] / A[j]).

mode "paper" (Alg. 3): x just produced, centre the next time; the network and the next update see s.
mode "pnm" (authors' TS-DPM, commit 146954f): x before the step, centre the next time; s replaces the target j.
mode "adm" (authors' TS-DPM-ADM, commit f69e84d): x before the step, centre i; the update goes to s - (i - j).
Deviations from the programs: windows are cut at the ends of the table (they crash or jump); the last step goes to the
final alpha; sigma is 0 where s is noisier than x (theirs: the root of a negative number); window <= 1 never shifts;
shifts stop once the variance is known to carry no signal. Their grids and final targets, and adm's reversed table,
offset, window near time 0 and lack of choice at cutoff 0, come with `released=True`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .multistep_solvers import (
    WARM_UPS,
    History,
    Level,
    OpenStep,
    adjusted,
    check_run,
    checked_eta,
    dpm_times,
    evaluation_times,
    level_at,
    move,
    predictions,
    transfer,
)
from .noise_schedule import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    SPACINGS,
    check_choices,
    checked_times,
    entry_of,
    noise_schedule,
    require_betas,
    require_output_like,
    settings_for,
    spaced_times,
    state_dtype,
)
from .shifted_times import (
    ADVICE,
    MISSED,
    best_times,
    check_shifts,
    data_variance,
    hook_denoiser,
    known_silent,
    least_alpha,
    may_shift,
    mean_time,
    released_times,
    slope_of,
    unhook_denoiser,
    unit_slopes,
    variance_bounds,
)

logger = logging.get_logger(__name__)

_ALLOWED = {
    "mode": ("paper", "pnm", "adm", "pndm"),
    "solver": ("ddim", "ddpm", "s_pndm", "f_pndm", "dpmsolver++"),
    "beta_schedule": BETA_SCHEDULES,
    "prediction_type": PREDICTION_TYPES,
    "timestep_spacing": SPACINGS,
}


@dataclass
class TimeShiftSchedulerOutput(BaseOutput):
    """Output of [`TimeShiftScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` of shape `(batch, channels, height, width)`): The sample to give to the model next.
        pred_original_sample (`torch.Tensor` of the same shape): The predicted clean sample x0, after clipping.
        shifted_timesteps (`torch.Tensor` of shape `(batch,)`, int64): The time chosen for each sample: in modes
            `"paper"` and `"pnm"` that of the end of the step, -1 where it is clean; in mode `"adm"` that of `sample`.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None
    shifted_timesteps: Tensor | None = None


class TimeShiftScheduler(SchedulerMixin, ConfigMixin):
    """Sampler that lets the variance of each sample choose its time, against exposure bias (arXiv 2305.15583).

    Stands in for [`DDIMScheduler`]: `pipe.scheduler = TimeShiftScheduler.from_config(pipe.scheduler.config)`. Made for
    pixel-space models: latents of unit variance (Stable Diffusion) carry no signal, see `data_variance`.

    Args:
        num_train_timesteps (`int`): Length T of the training schedule.
        beta_start, beta_end (`float`): First and last beta.
        beta_schedule (`str`): `"linear"`, `"scaled_linear"` (linear in sqrt(beta)) or `"squaredcos_cap_v2"` (cosine).
        trained_betas (array or list of floats, *optional*): The betas themselves, in place of the three above.
        clip_sample, clip_sample_range (`bool`, `float`): Clip the predicted clean sample to +- this range.
        set_alpha_to_one (`bool`): The last step goes to A = 1 (clean data); otherwise to A[0].
        steps_offset (`int`): Added to every time of the `"leading"` grid (Stable Diffusion: 1).
        prediction_type (`str`): `"epsilon"`, `"sample"` or `"v_prediction"`.
        thresholding, dynamic_thresholding_ratio, sample_max_value (`bool`, `float`, `float`): Dynamic thresholding in
            place of clipping, at this quantile and up to this value.
        timestep_spacing (`str`): `"leading"`, `"linspace"` or `"trailing"`, as in stock schedulers.
        rescale_betas_zero_snr (`bool`): Rescale the betas to A[T - 1] = 0 (arXiv 2305.08891).
        mode (`str`): `"paper"` shifts the time that the network sees next, one for the whole batch (as pipelines have
            it): the one with the least squared mismatch summed over the batch. `"pnm"` and `"adm"` shift the target
            of the update, sample by sample, but not in the first step; the network sees the nominal times. `"pndm"`
            shifts nothing: with `released=True`, which it needs, it is the program of PNDM itself.
        solver (`str`): `"ddim"`: noise as the `eta` of `step` says. `"ddpm"`: the same, but eta is 1 where it is given
            as 0, which is what stock pipelines pass when their caller says nothing. `"s_pndm"`, `"f_pndm"`: pseudo
            linear multistep of order 2 and 4 (arXiv 2202.09778), which evaluate the model twice in the first step
            (improved Euler), four times in each of the first three (Runge-Kutta). `"dpmsolver++"`: 2M, as
            [`DPMSolverMultistepScheduler`] has it by default, with its spacing of times (arXiv 2211.01095).
        window (`int`): Width of the search in training steps, `window // 2` to either side; 0 and 1: no shift.
        cutoff (`int`, *optional*): Shift only while the nominal time of the step (`"pnm"`: of its target) is above it;
            None: 3/10 of T. T - 1 or more: no shift.
        data_variance (`float`, *optional*): Mean variance s^2 of a clean sample over its values, which corrects the
            criterion ([`~TimeShiftScheduler.estimate_data_variance`]); at 0.95 or more nothing is shifted. None: the
            published criterion, the corrected one for s^2 = 0 (too late a time for real images), with a guard: s^2
            is estimated during the run and shifts stop once it is found to be near 1. 0.0: without the guard.
        released (`bool`): Follow the program behind mode `"pnm"`, `"adm"` or `"pndm"` in place of `timestep_spacing`,
            `steps_offset` and `set_alpha_to_one`, on its own grid (`released_times` in `shifted_times.py`). `"pnm"`:
            final A[0]. `"adm"`: final A = 1, v(tau) = A[T - 1 - tau], target s - T // (N - 1) - 1, eps recomputed from
            the clipped x0. `"pndm"` (commit e771949): the state at time t has A[t + 1], final A[0]. `clip_sample`
            stays yours; pnm and pndm have none.
        epsilon_scale, epsilon_scale_slope (`float`): Divide eps by `epsilon_scale + epsilon_scale_slope * i` in step
            i = 0, 1, ... (0: the noisiest), after converting the prediction and before clipping (arXiv 2308.15321; its
            scales are a little above 1). With `window=0` it is the pure method.

    Warm-up steps appear in `timesteps` once for each evaluation (see `multistep_solvers.py`). Samples of a batch share
    the shift of a Runge-Kutta step, since the network sees the times between, unless
    [`~TimeShiftScheduler.shift_per_sample`] is on.

    Attributes:
        shifted_timesteps (list of `torch.Tensor`): The last run's times as in `step`'s output, one `(batch,)` a step.
        sample_timesteps (`torch.Tensor` of shape `(batch,)`, or None): Times that the network has to see next, where
            `shift_per_sample` is on and they are not the entry of `timesteps` for every sample.
        step_index, begin_index (`int` or None): Index in `timesteps` of the next evaluation, of the first one.

    Raises:
        ValueError: For a value outside what is listed above.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: Literal["leading", "linspace", "trailing"] = "leading",
        rescale_betas_zero_snr: bool = False,
        mode: Literal["paper", "pnm", "adm", "pndm"] = "paper",
        solver: Literal["ddim", "ddpm", "s_pndm", "f_pndm", "dpmsolver++"] = "ddim",
        window: int = 20,
        cutoff: int | None = None,
        data_variance: float | None = None,
        released: bool = False,
        epsilon_scale: float = 1.0,
        epsilon_scale_slope: float = 0.0,
    ) -> None:
        check_choices(self.config, **_ALLOWED)
        check_shifts(self.config)
        self.betas, self.alphas_cumprod = noise_schedule(self.config)  # (T,) each, float64 on the CPU
        self._offset = 1 if self.config.mode == "pndm" else 0  # how far beyond a time its A lies in the table
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, device="cpu")
        self._warned: set[str] = set()
        self._per_sample: list[Any] = []  # what `shift_per_sample` has switched on
        self._reset([0], self.timesteps.device)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in [`ConfigMixin`], but raises a ValueError for a flow-matching config, whose model has no betas."""
        config = settings_for(cls, config)
        require_betas(cls, config)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def _grid(self, steps: int) -> list[int]:
        """Times of a run of `steps` steps, falling."""
        config = self.config
        times = spaced_times(config, steps)  # which says so if there cannot be that many
        if config.released:
            return released_times(config.mode, config.num_train_timesteps, steps)
        return dpm_times(config, steps) if config.solver == "dpmsolver++" else times

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | Tensor | None = None,
    ) -> None:
        """Set the times of the next run and forget the last one; call it before every run, as pipelines do.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps N (`released` pnm drops one of its own); the
                warm-up of a solver adds evaluations to them.
            device (`str` or `torch.device`, *optional*): Where `timesteps` lives.
            timesteps (list of ints or tensor of shape `(steps,)`, *optional*): The times of the steps themselves,
                strictly falling.

        Raises:
            ValueError: If not exactly one of the two is given, or the times do not fit the training schedule, or are
                too few for the solver's warm-up.
        """
        if (timesteps is None) == (num_inference_steps is None):
            raise ValueError("`set_timesteps` takes either `num_inference_steps` or `timesteps`: pass exactly one.")
        times = self._grid(num_inference_steps or 0) if timesteps is None else torch.as_tensor(timesteps).tolist()
        times = checked_times(times, len(self.alphas_cumprod) - self._offset)
        check_run(self.config, times, float(self.alphas_cumprod[times[0] + self._offset]))
        seen, _ = evaluation_times(self.config.solver, times)
        dtype = torch.float32 if self.config.solver == "f_pndm" else torch.int64
        self.num_inference_steps = len(times)
        self.timesteps = torch.tensor(seen, device=device).to(dtype)
        self._reset(times, self.timesteps.device)
        if known_silent(self.config):
            self._warn("given", f"Nothing is shifted at `data_variance` {self.config.data_variance}: {ADVICE}")

    def _reset(self, times: list[int], device: torch.device) -> None:
        """Forget the last run: all that `step` remembers is created here."""
        config = self.config
        clean = config.mode != "pnm" if config.released else config.set_alpha_to_one
        self._nominal = [*times, -1 if clean else 0]  # on the host; the last entry is the final target, A[-1] := 1
        _, self._entries = evaluation_times(config.solver, times)  # (step, evaluation in it) of each entry
        self.step_index: int | None = None
        self.begin_index: int | None = None
        self.shifted_timesteps: list[Tensor] = []  # (B,) per step
        self._slope: tuple[Tensor, Level] | None = None  # of eps on the sample, which tells s^2, and the level there
        self._silent: Tensor | None = None  # whether the variance is known to carry no signal
        self._off_schedule: Tensor | None = None
        self._history = History()
        self.sample_timesteps: Tensor | None = None
        self._place_tables(device)

    def _place_tables(self, device: torch.device) -> None:
        """Put what is known of A and v where the samples are, in float64 where the device has it."""
        dtype, alphas = state_dtype(device), self.alphas_cumprod.cpu()
        self._bounds = variance_bounds(self.config, alphas).to(dtype).to(device)  # (T - 1,)
        self._last_time = int((alphas > 0).sum()) - 1  # no signal is left at A = 0: never shift there
        if self.config.solver == "dpmsolver++":
            alphas = alphas.clamp(min=2**-24)  # as in stock, so that lambda is finite
        alphas = torch.cat([alphas.new_ones(1), alphas])[self._offset :]  # at the times -1, 0, 1, ...
        levels = torch.stack([alphas, alphas.sqrt(), (1 - alphas).sqrt(), *unit_slopes(alphas)], 1)
        self._levels = levels.to(dtype).to(device)  # (T + 1, 5)
        self._host_alphas: list[float] = alphas.tolist()
        nominal = self._levels[[time + 1 for time in self._nominal]]
        self._nominal_levels = {t: Level(*row.unbind()) for t, row in zip(self._nominal, nominal, strict=True)}

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run at this index of `timesteps`; pipelines that start from a noised image call it."""
        self.begin_index = begin_index

    def shift_per_sample(self, denoiser: torch.nn.Module | None = None) -> Callable[[], None]:
        """Let every sample of a batch have a time of its own, also where the network sees it: N samples as N runs.

        Pipelines give the network one time for the whole batch. A hook on the denoiser replaces its `timestep` by
        `sample_timesteps`, `(B,)`, or `(2B,)` under classifier-free guidance; `timesteps` then shows their mean. Mode
        `"paper"` needs it in every step, `"pnm"` and `"adm"` in the Runge-Kutta steps of `"f_pndm"`.

        Args:
            denoiser (`torch.nn.Module`, *optional*): The pipeline's `unet` or `transformer`. None: for a loop of your
                own, which gives the network `sample_timesteps` where it is not None, and `timesteps` otherwise.

        Returns:
            A function that takes the hook off again. Call it before the denoiser is used with another scheduler.

        Raises:
            ValueError: If the denoiser takes no `timestep`, or has such a hook already.

        Example:
            stop = pipe.scheduler.shift_per_sample(pipe.unet)
            images = pipe(batch_size=8).images
            stop()
        """
        hook = object() if denoiser is None else hook_denoiser(denoiser, self)
        self._per_sample.append(hook)

        def stop() -> None:
            if denoiser is not None:
                unhook_denoiser(denoiser, hook)
            if hook in self._per_sample:
                self._per_sample.remove(hook)
                self.sample_timesteps = None

        return stop

    @staticmethod
    def estimate_data_variance(images: Tensor) -> float:
        """Mean over images of the unbiased variance over all values of an image: what `data_variance` asks for.

        Args:
            images (`torch.Tensor` of shape `(count, channels, height, width)`): Clean, as the model sees them: pixels
                in [-1, 1], or scaled latents.
        """
        return float(images.detach().cpu().double().flatten(1).var(1).mean())

    @property
    def has_signal(self) -> bool:
        """Whether variance may tell the time: False once s^2 is given as or found to be near 1 (reads the device)."""
        return not known_silent(self.config) and (self._silent is None or not bool(self._silent.all()))

    @property
    def estimated_data_variance(self) -> Tensor | None:
        """s^2 as the network saw it last: a scalar, or `(batch,)` while `shift_per_sample` is on; None if it did not.

        It is estimated above `cutoff` where no `data_variance` is given: at times at which it can be told to 0.1, and
        in the last step that may be shifted.
        """
        return None if self._slope is None else data_variance(*self._slope)

    def _decides(self, step: int) -> bool:
        """Whether a step chooses a time by the variance of its samples; in paper mode it is the time after it."""
        if step + 2 >= len(self._nominal):
            return False
        if self.config.mode == "paper":
            return may_shift(self.config, self._nominal[step])
        centre = self._nominal[step if self.config.mode == "adm" else step + 1]
        return self.step_index is not None and may_shift(self.config, centre)

    def _match(self, x: Tensor, centre: int, joint: bool) -> Tensor:
        """Time in the window around `centre` that fits best, `(B,)`, or `(1,)` if `joint`; the earliest of equals."""
        found = best_times(self.config, x, self._bounds, centre, self._last_time, joint)
        return self._unless_silent(found, centre)

    def _unless_silent(self, shifted: Tensor, nominal: int) -> Tensor:
        return shifted if self._silent is None else shifted.masked_fill(self._silent, nominal)

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> TimeShiftSchedulerOutput | tuple[Tensor, ...]:
        """Take the sample from `timestep` to the next time of the schedule, shifted as the mode says.

        In a warm-up step, which has several entries in `timesteps`, to the state where its next evaluation lies.

        Args:
            model_output (`torch.Tensor` of shape `(batch, channels, height, width)`): The model's prediction.
            timestep (`int`, `float` or scalar `torch.Tensor`): The time that the model was given: the entry of
                `scheduler.timesteps` itself, not a copy, since shifted times are written there. Or the times of the
                samples, `(batch,)`.
            sample (`torch.Tensor` of the same shape): x at `timestep`, in the model's units.
            eta (`float`): Weight of the noise, in [0, 1]: 0 is DDIM, 1 is DDPM; see `solver` about 0. The solvers
                other than these take no noise.
            use_clipped_model_output (`bool`, *optional*): Recompute eps from the clipped x0. None: as the mode and the
                solver do (multistep solvers: yes).
            generator (`torch.Generator` or list of them, *optional*): Source of the noise.
            variance_noise (`torch.Tensor` of the same shape, *optional*): The noise itself, in place of `generator`.
            return_dict (`bool`): Return a [`TimeShiftSchedulerOutput`] rather than a tuple.

        Returns:
            [`TimeShiftSchedulerOutput`], or the tuple of its fields; samples in `sample.dtype`.

        Raises:
            ValueError: Before `set_timesteps`, for `eta` outside what the solver takes, or for two sources of noise.
        """
        if self.num_inference_steps is None:
            raise ValueError("Call `set_timesteps` before `step`: the times of the run are not known yet.")
        if generator is not None and variance_noise is not None:
            raise ValueError("`step` takes either `generator` or `variance_noise`, got both: pass one.")
        require_output_like(model_output, sample)
        eta = checked_eta(self.config.solver, eta)
        if eta > 0 and variance_noise is None:
            shape, device, dtype = model_output.shape, model_output.device, model_output.dtype
            variance_noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)

        index, seen = self._locate(timestep, sample.device)
        number, stage = self._entries[index]
        # Solvers that hand results on from step to step do so in float64; the others need no more than the samples.
        alone = self.config.solver in ("ddim", "ddpm")
        x = sample.to(torch.promote_types(sample.dtype, torch.float32) if alone else state_dtype(sample.device))
        start = self._level_at(seen, x)  # scalars, or (B, 1, 1, 1) where samples have their own times
        x0, eps = predictions(self.config.prediction_type, model_output.to(x.dtype), x, start)
        if stage == 0 and self.config.data_variance is None and may_shift(self.config, self._nominal[number]):
            self._estimate(eps, x, start, number)
        x0, eps = adjusted(self.config, x0, eps, x, start, number, use_clipped_model_output)
        ends = index + 1 == len(self._entries) or self._entries[index + 1][1] == 0
        chosen: int | Tensor
        if ends and stage == 0:
            target, chosen = self._target(x, number, joint=False)
            end = self._level_at(target, x)
            # Stock DPM-Solver takes the last step with first order where it ends clean, and in short runs.
            plain = index + 1 == len(self._entries) and (self._nominal[-1] < 0 or len(self._entries) < 15)
            pair = self._history.extrapolate(self.config.solver, x, x0, eps, start, end, plain)
            prev_sample = transfer(*pair, start, end, eta, variance_noise)
        else:
            prev_sample, chosen = self._warm_up(x, eps, start, seen, index)
        if ends and self.config.mode == "paper" and self._decides(number):
            chosen = self._match(prev_sample, self._nominal[number + 1], joint=not self._per_sample)
            self._show_next(chosen, index)
        if isinstance(chosen, int):
            chosen = torch.full((1,), chosen, device=sample.device)
        chosen = chosen.expand(sample.shape[0])
        self._conclude(index, chosen if ends else None)
        output = (prev_sample.to(sample.dtype), x0.to(sample.dtype), chosen)
        return TimeShiftSchedulerOutput(*output) if return_dict else output

    def _conclude(self, index: int, chosen: Tensor | None) -> None:
        """Count an evaluation; note the times chosen, `(B,)`, at the end of a step; say what was wrong at a run's."""
        self.step_index = index + 1
        if chosen is not None:
            self.shifted_timesteps.append(chosen)
        if self.step_index == len(self._entries):
            self._history = History()
            self._report()

    def _locate(self, timestep: int | float | Tensor, device: torch.device) -> tuple[int, Tensor]:
        """Index of the entry, found on the host, and the times that the model saw, `(1,)` or `(B,)`, on the device.

        Pipelines iterate over views of `self.timesteps`, so an entry's address tells its index without reading it.
        Otherwise entries are counted, from `begin_index` or from the last nominal time not below the first one given.
        """
        index = entry_of(timestep, self.timesteps)
        seen = timestep if isinstance(timestep, Tensor) else torch.full((1,), timestep, device=device)
        seen = seen.reshape(-1).to(device, self.timesteps.dtype)
        if index is None:
            index = self.begin_index if self.step_index is None else self.step_index
            if index is None or index >= len(self._entries):
                step = max(sum(time >= float(seen[0]) for time in self._nominal[:-1]) - 1, 0)
                index = self._entries.index((step, 0))
            if seen.shape[0] == 1:
                missed = (seen != self.timesteps[index].to(device)).any()
                self._off_schedule = missed if self._off_schedule is None else self._off_schedule | missed
        if index != self.step_index:  # not the successor of the last one: a run starts here
            self.step_index, self._silent, self.shifted_timesteps = None, None, []
            self._history, self.sample_timesteps = History(), None
        if self.sample_timesteps is not None and seen.shape[0] == 1:
            seen = self.sample_timesteps
        self.sample_timesteps = None
        return index, seen

    def _level_at(self, times: int | Tensor, like: Tensor) -> Level:
        """Noise level at the times given, broadcastable to `like`, on its device."""
        if self._levels.device != like.device:
            self._place_tables(like.device)
        if isinstance(times, int):
            return self._nominal_levels[times]
        return level_at(self._levels, times, like)

    def _estimate(self, eps: Tensor, x: Tensor, level: Level, step: int) -> None:
        """Estimate s^2, unless A is too small for it at all times that the network may have seen and steps follow."""
        half, (i, j) = self.config.window // 2, self._nominal[step : step + 2]
        least = least_alpha(x, bool(self._per_sample))
        if self._host_alphas[max(i - half, 0) + 1] > least or not may_shift(self.config, j):
            doubtful = self._host_alphas[min(i + half, self._last_time) + 1] <= least
            found = slope_of(eps, x, level, bool(self._per_sample), least if doubtful else None)
            self._slope, self._silent = (found[0], level), found[1]

    def _target(self, x: Tensor, step: int, joint: bool) -> tuple[int | Tensor, int | Tensor]:
        """Time that a step goes to and time to report; tensors where it is shifted: `(B,)`, or `(1,)` if `joint`."""
        i, j = self._nominal[step : step + 2]
        centre = i if self.config.mode == "adm" else j
        if self.config.mode == "paper" or not self._decides(step):
            return j, centre
        found = self._match(x, centre, joint and not self._per_sample)
        if self.config.mode == "pnm":
            return found, found
        stride = self.config.num_train_timesteps // (len(self._nominal) - 2) + 1 if self.config.released else i - j
        target = (found - stride).clamp(min=self._nominal[-1])
        return self._unless_silent(target, j) if self.config.released else target, found

    def _warm_up(self, x: Tensor, eps: Tensor, level: Level, seen: Tensor, index: int) -> tuple[Tensor, int | Tensor]:
        """Take one evaluation of a step that has several: the state to evaluate next, and the time to report."""
        number, stage = self._entries[index]
        if stage == 0:
            goal, chosen = self._target(x, number, joint=True)
            goal = goal if isinstance(goal, int) else goal.clamp(min=0)  # the network is asked there, too
            self._history.open_step = OpenStep(x, level, seen, goal, chosen)
        opened = self._history.open_step
        if opened is None:  # the run began in the middle of this step
            entry = self.timesteps[index + 1].reshape(1).to(x.device)
            return move(x, eps, level, self._level_at(entry, x)), entry.long()
        times, slope = self._history.evaluate(WARM_UPS[self.config.solver], stage, eps)
        if self._history.open_step is not None:
            self._show_next(torch.as_tensor(times), index)
        return move(opened.x, slope, opened.level, self._level_at(times, x)), opened.chosen

    def _show_next(self, times: Tensor, index: int) -> None:
        """Write the next times, `(1,)` or `(B,)`, into the schedule, where the caller's loop will see them."""
        self.timesteps[index + 1 : index + 2].copy_(mean_time(times, self.timesteps.dtype))
        if self._per_sample and times.shape[0] > 1:
            self.sample_timesteps = times.to(self.timesteps.dtype)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return the sample as it is: variance-preserving models take it unscaled."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noised samples sqrt(A) x0 + sqrt(1 - A) noise: `(batch, ...)` tensors, times `(batch,)` or `(1,)`."""
        level = self._level_at(timesteps.reshape(-1), original_samples)
        return level.signal * original_samples + level.noise * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Target of v-prediction, sqrt(A) noise - sqrt(1 - A) x0, for training; arguments as in `add_noise`."""
        level = self._level_at(timesteps.reshape(-1), sample)
        return level.signal * noise - level.noise * sample

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _report(self) -> None:
        """Say at the end of a run what was wrong with it, once; only here are the run's flags read from the device."""
        if "silent" not in self._warned and not self.has_signal and not known_silent(self.config):
            self._warn("silent", f"Nominal times were used once the variance proved to carry no signal: {ADVICE}")
        if "missed" not in self._warned and self._off_schedule is not None and bool(self._off_schedule):
            self._warn("missed", MISSED)

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            logger.warning(message)
