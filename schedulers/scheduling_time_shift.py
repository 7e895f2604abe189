"""Time-shift sampler: DDIM and DDPM steps taken at the time that the sample's own variance tells.

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

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

logger = logging.get_logger(__name__)

_ALLOWED = {
    "mode": ("paper", "pnm", "adm"),
    "solver": ("ddim", "ddpm"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
}
_ADVICE = (
    "data of unit variance keeps its variance whatever noise is mixed in, so it cannot tell the time. Use this sampler"
    " in pixel space, where the data variance is well below 1, and another one on the latents of Stable Diffusion"
    " (`data_variance=1.0` keeps to the nominal times from the start)."
)


@dataclass
class TimeShiftSchedulerOutput(BaseOutput):
    """Output of [`TimeShiftScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` of shape `(batch, channels, height, width)`): The sample to feed to the next step.
        pred_original_sample (`torch.Tensor` of the same shape): The predicted clean sample x0, after clipping.
        shifted_timesteps (`torch.Tensor` of shape `(batch,)`, int64): The time chosen for each sample: in modes
            `"paper"` and `"pnm"` that of `prev_sample`, -1 where it is clean; in mode `"adm"` that of `sample`.
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
            of the update, sample by sample, but not in the first step; the network sees the nominal times.
        solver (`str`): `"ddim"`: noise as the `eta` of `step` says. `"ddpm"`: the same, but eta is 1 where it is given
            as 0, which is what stock pipelines pass when their caller says nothing.
        window (`int`): Width of the search in training steps, `window // 2` to either side; 0 and 1: no shift.
        cutoff (`int`, *optional*): Shift only while the nominal time of the step (`"pnm"`: of its target) is above it;
            None: 3/10 of T. T - 1 or more: no shift.
        data_variance (`float`, *optional*): Mean variance s^2 of a clean sample over its values, which corrects the
            criterion ([`~TimeShiftScheduler.estimate_data_variance`]); at 0.95 or more nothing is shifted. None: the
            published criterion, the corrected one for s^2 = 0 (too late a time for real images), with a guard: s^2
            is estimated during the run and shifts stop once it is found to be near 1. 0.0: without the guard.
        released (`bool`): Follow the program behind mode `"pnm"` or `"adm"` in place of `timestep_spacing`,
            `steps_offset` and `set_alpha_to_one`. `"pnm"`: times 1, 1 + T // N, ... without the largest (N = 10: 801,
            701, ..., 1), final A[0]. `"adm"`: N times 0, d, 2d, ..., d the smallest stride that gives exactly N, final
            A = 1, v(tau) = A[T - 1 - tau], target s - T // (N - 1) - 1, eps recomputed from the clipped x0.
            `clip_sample` stays yours; pnm has none.

    Attributes:
        shifted_timesteps (list of `torch.Tensor`): The last run's times as in `step`'s output, one `(batch,)` a step.
        estimated_data_variance (scalar `torch.Tensor` or None): s^2 as the network saw it last, where it is estimated.
        step_index, begin_index (`int` or None): Index in `timesteps` of the next step, of the first one.

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
        mode: Literal["paper", "pnm", "adm"] = "paper",
        solver: Literal["ddim", "ddpm"] = "ddim",
        window: int = 20,
        cutoff: int | None = None,
        data_variance: float | None = None,
        released: bool = False,
    ) -> None:
        self._check_config()
        self.betas, self.alphas_cumprod = self._noise_schedule()  # (T,) each, float64 on the CPU
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, device="cpu")
        self._warned: set[str] = set()
        self._reset(self.timesteps.tolist(), self.timesteps.device)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in [`ConfigMixin`], but raises a ValueError for a flow-matching config, whose model has no betas."""
        if isinstance(config, dict):
            name = str(config.get("_class_name", ""))
            foreign = {"shift", "use_dynamic_shifting", "sigma_data"} & set(config) or name.startswith(
                ("FlowMatch", "EDM")
            )
            no_betas = "beta_start" not in config and foreign
            if no_betas or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
                raise ValueError(
                    f"{cls.__name__} needs a schedule of betas (epsilon, sample or v prediction), got a flow-matching"
                    f" config or EDM's ({name or 'unnamed'}): keep the scheduler that came with the model."
                )
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def _check_config(self) -> None:
        config = self.config
        for name, allowed in _ALLOWED.items():
            if config[name] not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {config[name]!r}.")
        if not isinstance(config.window, int) or config.window < 0:
            raise ValueError(f"`window` must be a whole number of training steps >= 0, got {config.window!r}.")
        if config.cutoff is not None and not 0 <= config.cutoff <= config.num_train_timesteps:
            limit = f"[0, {config.num_train_timesteps}] (`num_train_timesteps`)"
            raise ValueError(f"`cutoff` must lie in {limit} or be None, got {config.cutoff!r}.")
        if config.data_variance is not None and not config.data_variance >= 0:
            raise ValueError(f"`data_variance` must be >= 0 or None, got {config.data_variance!r}.")
        if config.released and config.mode == "paper":
            raise ValueError("`released=True` needs mode 'pnm' or 'adm': no program of the paper's own mode exists.")

    def _noise_schedule(self) -> tuple[Tensor, Tensor]:
        """Betas and alphas_cumprod, `(T,)` each."""
        config, count = self.config, self.config.num_train_timesteps
        if config.trained_betas is not None:
            betas = np.array(config.trained_betas, dtype=np.float64)
        elif config.beta_schedule == "linear":
            betas = np.linspace(config.beta_start, config.beta_end, count)
        elif config.beta_schedule == "scaled_linear":
            betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, count) ** 2
        else:
            cosine = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - cosine[1:] / cosine[:-1], 0.999)
        alphas_cumprod = np.cumprod(1 - betas)
        if config.rescale_betas_zero_snr:
            root = np.sqrt(alphas_cumprod)
            alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
            betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        return torch.from_numpy(betas), torch.from_numpy(alphas_cumprod)

    def _grid(self, steps: int) -> list[int]:
        """Times of a run of `steps` steps, falling."""
        config, count = self.config, self.config.num_train_timesteps
        if not 1 <= steps <= count:
            raise ValueError(f"`num_inference_steps` must lie in [1, {count}] (`num_train_timesteps`), got {steps}.")
        if config.released and config.mode == "pnm":
            times = np.arange(0, count, count // steps)[:-1] + 1
        elif config.released:
            times = np.arange(0, count, -(-count // steps))
            if len(times) != steps:
                raise ValueError(f"The released adm grid cannot have {steps} steps; the nearest has {len(times)}.")
        elif config.timestep_spacing == "leading":
            times = np.arange(steps) * (count // steps) + config.steps_offset
        elif config.timestep_spacing == "linspace":
            times = np.linspace(0, count - 1, steps).round()
        else:
            times = np.round(count - np.arange(steps) * (count / steps))[::-1] - 1
        return times[::-1].tolist()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | Tensor | None = None,
    ) -> None:
        """Set the times of the next run and forget the last one; call it before every run, as pipelines do.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps N (`released` pnm drops one of its own).
            device (`str` or `torch.device`, *optional*): Where `timesteps` lives.
            timesteps (list of ints or tensor of shape `(steps,)`, *optional*): The times themselves, strictly falling.

        Raises:
            ValueError: If not exactly one of the two is given, or the times do not fit the training schedule.
        """
        if (timesteps is None) == (num_inference_steps is None):
            raise ValueError("`set_timesteps` takes either `num_inference_steps` or `timesteps`: pass exactly one.")
        times = self._grid(num_inference_steps or 0) if timesteps is None else torch.as_tensor(timesteps).tolist()
        if not times or any(time % 1 for time in times) or any(a <= b for a, b in zip(times, times[1:], strict=False)):
            raise ValueError(f"The times of a run must be whole, fall strictly and be at least one, got {times}.")
        last = len(self.alphas_cumprod) - 1
        if times[0] > last or times[-1] < 0:
            raise ValueError(
                f"Times must lie in [0, {last}], got {times}: take fewer steps or another `steps_offset`."
            )
        times = [int(time) for time in times]
        self.num_inference_steps = len(times)
        self.timesteps = torch.tensor(times, dtype=torch.int64, device=device)
        self._reset(times, self.timesteps.device)
        if self._known_silent():
            self._warn("given", f"Nothing is shifted at `data_variance` {self.config.data_variance}: {_ADVICE}")

    def _reset(self, times: list[int], device: torch.device) -> None:
        """Forget the last run: all that `step` remembers is created here."""
        config = self.config
        clean = config.mode == "adm" if config.released else config.set_alpha_to_one
        self._nominal = [*times, -1 if clean else 0]  # on the host; the last entry is the final target, A[-1] := 1
        self.step_index: int | None = None
        self.begin_index: int | None = None
        self.shifted_timesteps: list[Tensor] = []  # (B,) per step
        self.estimated_data_variance: Tensor | None = None
        self._silent: Tensor | None = None  # whether the variance is known to carry no signal
        self._off_schedule: Tensor | None = None
        self._place_tables(device)

    def _place_tables(self, device: torch.device) -> None:
        """Put A and v where the samples are, in float64 where the device has it."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        alphas = self.alphas_cumprod.cpu()
        noise = alphas.flip(0) if self.config.released and self.config.mode == "adm" else 1 - alphas
        expected = noise + (self.config.data_variance or 0.0) * (1 - noise)
        self._expected = expected.to(dtype).to(device)  # v, (T,)
        self._alphas = torch.cat([alphas.new_ones(1), alphas]).to(dtype).to(device)  # (T + 1,): entry k is A[k - 1]
        self._last_time = int((alphas > 0).sum()) - 1  # no signal is left at A = 0: never shift there

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run at this index of `timesteps`; pipelines that start from a noised image call it."""
        self.begin_index = begin_index

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
        return not self._known_silent() and (self._silent is None or not bool(self._silent))

    def _known_silent(self) -> bool:
        return self.config.data_variance is not None and self.config.data_variance >= 0.95

    def _may_shift(self, nominal: int) -> bool:
        config = self.config
        cutoff = 3 * config.num_train_timesteps // 10 if config.cutoff is None else config.cutoff
        return config.window > 1 and nominal > cutoff and not self._known_silent()

    def _released_adm(self) -> bool:
        return self.config.released and self.config.mode == "adm"

    def _observe(self, x: Tensor, eps: Tensor, alpha: Tensor) -> None:
        """Estimate s^2, and judge by it whether the criterion means anything; all of it stays on the device.

        A network trained by least squares has E<eps, x> = sqrt(1 - A) n, whatever the data, so the slope of eps on x
        tells the variance V = sqrt(1 - A) / slope that the network expects at its time, and V = 1 - (1 - s^2) A. The
        variance of the states would be a poor witness: exposure bias and the solver's own error disturb it (ten steps
        shrink unit-variance data to 0.7), and its noise is carried along the run, so that steps do not average it out.
        The same holds for the errors of V, taken as 0.5 % for the network and sqrt(A / n) for the sample: the last
        estimate, at the largest A, is the best one. Guidance exaggerates s^2, hence the wide upper bound.
        """
        alpha = alpha.mean()
        centred = x - x.flatten(1).mean(1).reshape(-1, *[1] * (x.ndim - 1))
        slope = (eps * centred).sum() / centred.square().sum()
        variance = (1 - alpha).sqrt() / slope.clamp(min=0.01)
        error = (0.005 + (alpha / x.numel()).sqrt()) / alpha
        self.estimated_data_variance = (variance - 1 + alpha) / alpha
        self._silent = (error < 0.1) & (self.estimated_data_variance > 0.8) & (self.estimated_data_variance < 2.0)

    def _match(self, x: Tensor, centre: int) -> Tensor:
        """Time in the window around `centre` whose expected variance fits best, `(B,)`; the earliest of equals."""
        half = self.config.window // 2
        low, high = max(centre - half, 0), min(centre + half, self._last_time)
        if self._released_adm() and self.config.cutoff == 0:
            low = high = centre  # the program makes no choice there, but applies its offset
        elif self._released_adm() and centre <= half:
            low, high = 0, min(self.config.window, self._last_time)
        mismatch = (x.flatten(1).var(1, keepdim=True) - self._expected[low : high + 1]).square()  # (B, window)
        if self.config.mode == "paper":
            mismatch = mismatch.sum(0, keepdim=True).expand_as(mismatch)
        return self._unless_silent(low + mismatch.argmin(1), centre)

    def _unless_silent(self, shifted: Tensor, nominal: int) -> Tensor:
        return shifted if self._silent is None else torch.where(self._silent, nominal, shifted)

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

        Args:
            model_output (`torch.Tensor` of shape `(batch, channels, height, width)`): The model's prediction.
            timestep (`int` or scalar `torch.Tensor`): The time that the model was given: the entry of
                `scheduler.timesteps` itself, not a copy, since mode `"paper"` writes shifted times there.
            sample (`torch.Tensor` of the same shape): x at `timestep`, in the model's units.
            eta (`float`): Weight of the noise, in [0, 1]: 0 is DDIM, 1 is DDPM; see `solver` about 0.
            use_clipped_model_output (`bool`, *optional*): Recompute eps from the clipped x0. None: as the mode does.
            generator (`torch.Generator` or list of them, *optional*): Source of the noise.
            variance_noise (`torch.Tensor` of the same shape, *optional*): The noise itself, in place of `generator`.
            return_dict (`bool`): Return a [`TimeShiftSchedulerOutput`] rather than a tuple.

        Returns:
            [`TimeShiftSchedulerOutput`], or the tuple of its fields; samples in `sample.dtype`.

        Raises:
            ValueError: Before `set_timesteps`, for `eta` outside [0, 1], or for two sources of noise.
        """
        if self.num_inference_steps is None:
            raise ValueError("Call `set_timesteps` before `step`: the times of the run are not known yet.")
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta` must lie in [0, 1] (0: DDIM, 1: DDPM), got {eta}.")
        if generator is not None and variance_noise is not None:
            raise ValueError("`step` takes either `generator` or `variance_noise`, got both: pass one.")
        if self.config.solver == "ddpm" and eta == 0:
            eta = 1.0
        if eta > 0 and variance_noise is None:
            shape, device, dtype = model_output.shape, model_output.device, model_output.dtype
            variance_noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)

        index, seen = self._locate(timestep, sample.device)
        alpha_t = self._alpha_at(seen, sample)  # (1, 1, 1, 1)
        x = sample.to(alpha_t.dtype)
        x0, eps = self._predict(model_output.to(x.dtype), x, alpha_t)
        if self.config.data_variance is None and self._may_shift(self._nominal[index]):
            self._observe(x, eps, alpha_t)
        x0, eps = self._clip(x0, eps, x, alpha_t, use_clipped_model_output)
        target, chosen = self._target(x, index)  # (1,), or (B,) where samples may differ
        prev_sample = self._transfer(x0, eps, alpha_t, self._alpha_at(target, sample), eta, variance_noise)
        if self.config.mode == "paper":
            chosen = self._shift_next_time(prev_sample, index)
        self.step_index = index + 1
        self.shifted_timesteps.append(chosen.repeat(len(sample) // len(chosen)))
        if self.step_index == len(self.timesteps):
            self._report()
        output = (prev_sample.to(sample.dtype), x0.to(sample.dtype), self.shifted_timesteps[-1])
        return TimeShiftSchedulerOutput(*output) if return_dict else output

    def _locate(self, timestep: int | float | Tensor, device: torch.device) -> tuple[int, Tensor]:
        """Index of the step, found on the host, and the time that the model saw, `(1,)` on the sample's device.

        Pipelines iterate over views of `self.timesteps`, so an entry's address tells its index without reading it.
        Otherwise steps are counted, from `begin_index` or from the last nominal time not below the first one given.
        """
        count, index = len(self.timesteps), None
        seen = timestep if isinstance(timestep, Tensor) else torch.full((1,), int(timestep), device=device)
        if seen.device == self.timesteps.device:
            index = (seen.data_ptr() - self.timesteps.data_ptr()) // self.timesteps.element_size()
        seen = seen.reshape(-1).to(device, torch.int64)
        if index is None or not 0 <= index < count:
            index = self.begin_index if self.step_index is None else self.step_index
            if index is None or index >= count:
                index = max(sum(time >= int(timestep) for time in self._nominal[:-1]) - 1, 0)
            missed = (seen != self.timesteps[index].to(device)).any()
            self._off_schedule = missed if self._off_schedule is None else self._off_schedule | missed
        if index != self.step_index:  # not the successor of the last step: a run starts here
            self.step_index, self._silent, self.shifted_timesteps = None, None, []
        return index, seen

    def _alpha_at(self, times: Tensor, like: Tensor) -> Tensor:
        """A at the times given (-1: clean data), shaped to broadcast over the batch of `like`, on its device."""
        if self._alphas.device != like.device:
            self._place_tables(like.device)
        # index_select, because indexing with a scalar tensor reads it back to the host.
        alphas = self._alphas.index_select(0, times.reshape(-1).to(like.device) + 1)
        return alphas.reshape(-1, *[1] * (like.ndim - 1))

    def _predict(self, output: Tensor, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Clean sample and noise that the model's output stands for: x = sqrt(A) x0 + sqrt(1 - A) eps."""
        signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
        if self.config.prediction_type == "epsilon":
            return (x - noise * output) / signal, output
        if self.config.prediction_type == "sample":
            return output, (x - signal * output) / noise
        return signal * x - noise * output, signal * output + noise * x

    def _clip(self, x0: Tensor, eps: Tensor, x: Tensor, alpha: Tensor, new_eps: bool | None) -> tuple[Tensor, Tensor]:
        """Clip x0, or threshold it dynamically (arXiv 2205.11487, section 2.3); keep eps or make it agree with x0."""
        config = self.config
        if config.thresholding:
            bound = torch.quantile(x0.abs().flatten(1), config.dynamic_thresholding_ratio, dim=1)
            bound = bound.clamp(min=1).clamp(max=config.sample_max_value).reshape(-1, *[1] * (x0.ndim - 1))
            x0 = x0.clamp(-bound, bound) / bound
        elif config.clip_sample:
            x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
        if new_eps is None:
            new_eps = config.released and config.mode == "adm"
        return x0, (x - alpha.sqrt() * x0) / (1 - alpha).sqrt() if new_eps else eps

    def _target(self, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Time that the update goes to and time to report; `(1,)` each, or `(B,)` where samples may differ."""
        i, j = self._nominal[index : index + 2]
        centre = i if self.config.mode == "adm" else j
        inner = self.step_index is not None and index + 1 < len(self.timesteps)
        if self.config.mode == "paper" or not inner or not self._may_shift(centre):
            return torch.full((1,), j, device=x.device), torch.full((1,), centre, device=x.device)
        found = self._match(x, centre)
        if self.config.mode == "pnm":
            return found, found
        stride = self.config.num_train_timesteps // (len(self.timesteps) - 1) + 1 if self.config.released else i - j
        return self._unless_silent((found - stride).clamp(min=self._nominal[-1]), j), found

    def _shift_next_time(self, prev_sample: Tensor, index: int) -> Tensor:
        """Write the time that fits the new sample into the schedule, where the caller's loop will see it."""
        i, j = self._nominal[index : index + 2]
        if index + 1 == len(self.timesteps) or not self._may_shift(i):
            return torch.full((1,), j, device=prev_sample.device)
        found = self._match(prev_sample, j)
        self.timesteps[index + 1].copy_(found[0])
        return found

    def _transfer(self, x0: Tensor, eps: Tensor, a_t: Tensor, a_s: Tensor, eta: float, z: Tensor | None) -> Tensor:
        """The DDIM update (arXiv 2010.02502, eq. 12 and 16) from A = a_t to A = a_s."""
        if eta == 0 or z is None:
            return a_s.sqrt() * x0 + (1 - a_s).sqrt() * eps
        gain = (a_s - a_t).clamp(min=0) / a_s.clamp(min=torch.finfo(a_s.dtype).tiny)
        variance = eta**2 * gain * (1 - a_s) / (1 - a_t)
        return a_s.sqrt() * x0 + (1 - a_s - variance).clamp(min=0).sqrt() * eps + variance.sqrt() * z

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return the sample as it is: variance-preserving models take it unscaled."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noised samples sqrt(A) x0 + sqrt(1 - A) noise: `(batch, ...)` tensors, times `(batch,)` or `(1,)`."""
        alpha = self._alpha_at(timesteps, original_samples)
        dtype = original_samples.dtype
        return alpha.sqrt().to(dtype) * original_samples + (1 - alpha).sqrt().to(dtype) * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Target of v-prediction, sqrt(A) noise - sqrt(1 - A) x0, for training; arguments as in `add_noise`."""
        alpha = self._alpha_at(timesteps, sample)
        return alpha.sqrt().to(sample.dtype) * noise - (1 - alpha).sqrt().to(sample.dtype) * sample

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _report(self) -> None:
        """Say at the end of a run what was wrong with it, once; only here are the run's flags read from the device."""
        if "silent" not in self._warned and not self.has_signal and not self._known_silent():
            self._warn("silent", f"Nominal times were used once the variance proved to carry no signal: {_ADVICE}")
        if "missed" not in self._warned and self._off_schedule is not None and bool(self._off_schedule):
            self._warn(
                "missed",
                "`step` was given times other than those in `scheduler.timesteps` and took them for the ones the model"
                " saw, so shifts were lost: iterate over `scheduler.timesteps` itself, not over a copy.",
            )

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            logger.warning(message)
