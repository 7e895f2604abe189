"""RDDM sampler: two diffusions at once, of a residual and of noise, for restoration and generation.

Liu, Wang, Fan, Wang, Tang, Qu, "Residual Denoising Diffusion Models", CVPR 2024, arXiv 2308.13712. With x0 the clean
picture, y the degraded one (0 for generation), R = y - x0, sums A_t and B2_t = B_t^2 of two schedules of weights, and
t > s two times of a run:

    x_t = x0 + A_t R + B_t eps                                                       `add_noise`
    x   = y + sqrt(S) noise, S = `sum_scale`                                         `initial_sample`
    x_s = x_t - (A_t - A_s) R - (B_t - sqrt(B2_s - v)) eps + sqrt(v) z               `step`
    v   = eta (B2_t - B2_s) B2_s / B2_t

R and eps are what the network's heads stand for (`prediction_type`), and the last step gives the predicted x0 itself.
A run over all T times is the ancestral sampler, eta = 1 in terms of x0: with a_t, b_t = A_t - A_s, B2_t - B2_s,

    x_s = (B2_s x_t + (b_t A_s - B2_s a_t) R + b_t x0) / B2_t + sqrt(b_t B2_s / B2_t) z.

A model of DDPM is one of these: with A' = `alphas_cumprod`, A_t = 1 - sqrt(A'_t), B2_t = 1 - A'_t, y = 0. From the
config of a stock scheduler, `from_config` makes that, with the variance of DDIM,

    v   = eta^2 (1 - A'_s) / (1 - A'_t) (1 - A'_t / A'_s)

(The v above would be A'_s times that at eta = 1, which is why the two are kept apart.)

Differences from the released programs (commit e597481; written from the equations, not from their code): neighbours
come from the list of times in every mode; eta is not forced to 0 where there is a y; generation starts with sqrt(S)
noise, where theirs starts with noise (they use S = 1); tables and states in float64. Kept as there: residuals are
clipped to [-1, 1] though those of pictures span [-2, 2]; models of DDPM keep the unclipped eps unless
`use_clipped_model_output`, and end with the formula, unclipped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from .carried_state import CarriedStateMixin, Generators, noise_like, require_like
from .noise_schedule import (
    PREDICTION_TYPES,
    checked_times,
    noise_schedule,
    require_betas,
    require_fraction,
    require_output_like,
    require_steps,
    settings_for,
    spaced_times,
)
from .residual_schedule import TWO_HEADS, check_settings, has_betas, weights_of

__all__ = ["RDDMScheduler", "RDDMSchedulerOutput"]

Heads = Tensor | Sequence[Tensor]


@dataclass
class RDDMSchedulerOutput(BaseOutput):
    """Output of [`RDDMScheduler.step`], four tensors of shape `(batch, channels, height, width)`.

    Args:
        prev_sample (`torch.Tensor`): The sample to feed to the next step; after the last one the clean sample.
        pred_original_sample (`torch.Tensor`): x0 as predicted.
        pred_residual (`torch.Tensor`): R as predicted.
        pred_noise (`torch.Tensor`): eps as predicted.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None
    pred_residual: Tensor | None = None
    pred_noise: Tensor | None = None


class RDDMScheduler(CarriedStateMixin, SchedulerMixin, ConfigMixin):
    """Residual denoising diffusion (RDDM, arXiv 2308.13712), for its own models and for those of DDPM.

    Restoration, with a model trained for it:

        scheduler.set_timesteps(5)
        x = scheduler.initial_sample(degraded, noise)     # (B, C, H, W) each
        for t in scheduler.timesteps:
            x = scheduler.step(model(torch.cat([x, degraded], 1), t), t, x, degraded).prev_sample

    Generation, with any model of DDPM: `pipe.scheduler = RDDMScheduler.from_config(pipe.scheduler.config)` gives what
    DDIM gives where nothing is clipped, and other schedules of the residual where `alpha_schedule` names one. To
    remove residual and noise one after the other, run `step_residual` over all times and then `step_noise`.

    Args:
        num_train_timesteps (`int`): Length T of the training schedule.
        alpha_schedule (`str`, *optional*): Weights of the residual, which sum to 1: `"decreased"`, `"increased"`,
            `"average"` or `"normal"` (a bell over [-3, 3]). None: 1 - sqrt(`alphas_cumprod`), of the betas.
        beta_schedule (`str`): Weights of the noise's variance, which sum to S: one of these, or `"linear"`,
            `"scaled_linear"`, `"squaredcos_cap_v2"`: 1 - `alphas_cumprod`, of the betas.
        alpha_ratio, beta_ratio (`float`, *optional*): Power a of increasing or decreasing weights linspace(0, 1, T)^a.
            None: the weights 1 ... T, as for restoration.
        sum_scale (`float`): S, variance of the noise at the last time, in (0, 1]: 1, or 0.01 for restoration with
            little of it. Without effect if the noise's schedule is one of betas.
        prediction_type (`str`): What the heads put out. Two heads: `"pred_res_noise"` (R, eps), `"pred_x0_noise"`
            (x0, eps), `"pred_res_add_noise"` (R, R + eps), `"pred_x0_add_noise"` (x0, x0 + eps); one:
            `"pred_noise"`, `"pred_res"`. Of models of DDPM, which need betas: `"epsilon"`, `"sample"`,
            `"v_prediction"`.
        clip_sample (`bool`): Clip predicted residuals and clean samples.
        clip_sample_range (`float`): To plus and minus this value.
        timestep_spacing (`str`): `"truncated"`, linspace(-1, T - 1, N + 1) rounded towards 0 without the first, as in
            the released programs; `"leading"`, `"linspace"` or `"trailing"`, as in stock schedulers.
        beta_start, beta_end (`float`): First and last beta, where the noise's schedule is one of betas.
        trained_betas (array or list of floats, *optional*): The betas themselves, whatever `beta_schedule` says.
        rescale_betas_zero_snr (`bool`): Rescale the betas to `alphas_cumprod[T - 1] = 0` (arXiv 2305.08891).
        set_alpha_to_one (`bool`): Models of DDPM: the last step goes to A = B = 0 (clean data); otherwise to the first
            time's.
        steps_offset (`int`): Added to every time of the `"leading"` grid (Stable Diffusion: 1).

    Attributes:
        alphas_cumsum, betas2_cumsum, betas_cumsum (`torch.Tensor` of shape `(T,)`): A, B2, B, float64 on the CPU.
        betas, alphas_cumprod (`torch.Tensor` of shape `(T,)` or None): Where the noise's schedule is one of betas.
        step_index, begin_index (`int` or None): Index in `timesteps` of the next step, of the first one.

    Raises:
        ValueError: For a value outside what is listed above, or a combination that has no meaning.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        alpha_schedule: Literal["increased", "decreased", "average", "normal"] | None = "decreased",
        beta_schedule: str = "increased",
        alpha_ratio: float | None = None,
        beta_ratio: float | None = None,
        sum_scale: float = 1.0,
        prediction_type: str = "pred_res_noise",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        timestep_spacing: Literal["truncated", "leading", "linspace", "trailing"] = "truncated",
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        trained_betas: np.ndarray | list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
    ) -> None:
        check_settings(self.config)
        self.betas: Tensor | None = None
        self.alphas_cumprod: Tensor | None = None
        if has_betas(self.config):
            self.betas, self.alphas_cumprod = noise_schedule(self.config)
            self.betas2_cumsum = 1 - self.alphas_cumprod
            self.alphas_cumsum = 1 - self.alphas_cumprod.sqrt()
        else:
            weights = weights_of(beta_schedule, beta_ratio, num_train_timesteps)
            self.betas2_cumsum = (sum_scale * weights).cumsum(0).clamp(0, 1)
        if alpha_schedule is not None:
            weights = weights_of(alpha_schedule, alpha_ratio, num_train_timesteps)
            self.alphas_cumsum = weights.cumsum(0).clamp(0, 1)
        self.betas_cumsum = self.betas2_cumsum.sqrt()
        # What a network takes for the part of x0 in x_t: a model of DDPM its own, whatever the sampler uses. Where
        # nothing is left of it, RDDM's predictions are clipped to black or white, as in its program.
        signal = 1 - self.alphas_cumsum
        signal = torch.where(signal < 1e-12, 1e-6, signal)
        if self._of_ddpm and self.alphas_cumprod is not None:
            signal = self.alphas_cumprod.sqrt()
        self._host = signal.tolist(), self.alphas_cumsum.tolist(), self.betas2_cumsum.tolist()
        self.num_inference_steps: int | None = None
        self._ancestral = False
        self._start(list(range(num_train_timesteps - 1, -1, -1)), "cpu")

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in [`ConfigMixin`]; the config of a stock scheduler with betas becomes that of the same process.

        Of such a config, defaults are taken over too: the betas, what the model predicts, clipping and the spacing of
        times. `alpha_schedule="average"` and the like change the residual's schedule alone.

        Raises:
            ValueError: For a flow-matching or EDM config, or one of another process: no betas, no DDPM.
        """
        config = settings_for(cls, config)
        require_betas(cls, config)
        if isinstance(config, Mapping) and "beta_start" in config and "alpha_schedule" not in config:
            of_ddpm = {
                "alpha_schedule": None, "beta_schedule": "linear", "prediction_type": "epsilon",
                "clip_sample": False, "timestep_spacing": "leading",
            }  # fmt: skip
            config = {**of_ddpm, **{key: value for key, value in config.items() if key != "_use_default_values"}}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor | Sequence[float], **config: Any) -> Self:
        """Make a scheduler for a model of DDPM from the products of its alphas.

        Args:
            alphas_cumprod (tensor or sequence of shape `(T,)`): In [0, 1], falling; 0 at most at the end.
            config: What else the scheduler takes, such as `clip_sample`.

        Raises:
            ValueError: If the products leave [0, 1] or rise, or are 0 before the end.
        """
        products = torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu()
        betas = 1 - products / torch.cat([products.new_ones(1), products[:-1]])
        if not bool(((betas >= 0) & (betas <= 1)).all()):  # not a number after a 0
            raise ValueError("`alphas_cumprod` must lie in [0, 1], never rise, and be 0 at most at the end.")
        settings = {"alpha_schedule": None, "beta_schedule": "linear", "prediction_type": "epsilon", **config}
        return cls(num_train_timesteps=len(products), trained_betas=betas.tolist(), **settings)

    @property
    def _of_ddpm(self) -> bool:
        """Whether the prediction is one of stock schedulers."""
        return self.config.prediction_type in PREDICTION_TYPES

    # A run

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | Tensor | None = None,
    ) -> None:
        """Set the times of the next run and forget the last one; call it before every run, as pipelines do.

        All T times (None, or N = T) make a run of the ancestral sampler, in which eta has no part, as in the released
        program; models of DDPM, and times that are given, are always sampled with eta.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps N, at most T. None: T.
            device (`str` or `torch.device`, *optional*): Where `timesteps` lives.
            timesteps (list of ints or tensor of shape `(N,)`, *optional*): The times themselves, strictly falling.

        Raises:
            ValueError: If both are given, the times do not fit the training schedule, or the first time has no signal
                and the model predicts epsilon.
        """
        if timesteps is not None and num_inference_steps is not None:
            raise ValueError("`set_timesteps` takes either `num_inference_steps` or `timesteps`: pass one.")
        count = self.config.num_train_timesteps
        steps = count if num_inference_steps is None else num_inference_steps
        if timesteps is not None:
            times = torch.as_tensor(timesteps).tolist()
        elif self.config.timestep_spacing == "truncated":
            require_steps(steps, count)
            # in float32, as there: now and then that is one less
            times = torch.linspace(-1, count - 1, steps + 1, dtype=torch.float32).int().tolist()[:0:-1]
        else:
            times = spaced_times(self.config, steps)
        times = checked_times(times, count)
        if self.config.prediction_type == "epsilon" and self._host[0][times[0]] == 0:
            raise ValueError(
                f"At the time {times[0]} no signal is left (`rescale_betas_zero_snr`), so a predicted epsilon tells"
                " nothing: choose another grid."
            )
        self._ancestral = timesteps is None and steps == count and not self._of_ddpm
        self.num_inference_steps = len(times)
        self._start(times, device)

    @property
    def init_noise_sigma(self) -> float:
        """What pipelines multiply the first latents by: sqrt(S), and 1 for betas, as in stock."""
        return 1.0 if has_betas(self.config) else self.config.sum_scale**0.5

    def initial_sample(self, degraded: Tensor | None, noise: Tensor) -> Tensor:
        """Where a run begins: y + sqrt(S) noise.

        Args:
            degraded (`torch.Tensor` of shape `(batch, channels, height, width)` or None): y; None for generation.
            noise (`torch.Tensor` of the same shape): Standard normal.

        Returns:
            The sample for the first step, of the same shape.

        Raises:
            ValueError: If the shapes differ.
        """
        if degraded is None:
            return self.init_noise_sigma * noise
        require_like(degraded, noise=noise)
        return degraded + self.init_noise_sigma * noise.to(degraded)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample as it is: these models take it unscaled."""
        return sample

    def network_times(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """What two networks, one a head, are told instead of the time: A T and B T, `(batch,)` each, float64.

        Args:
            timesteps (`torch.Tensor` of shape `(batch,)`): Times in [0, T - 1].
        """
        self._check_times(timesteps)
        times, count = timesteps.reshape(-1), self.config.num_train_timesteps
        return count * self._at("alphas_cumsum", times, times), count * self._at("betas_cumsum", times, times)

    def step(
        self,
        model_output: Heads,
        timestep: int | float | Tensor,
        sample: Tensor,
        degraded: Tensor | None = None,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> RDDMSchedulerOutput | tuple[Tensor, ...]:
        """Take the sample from `timestep` to the next time of the schedule.

        Args:
            model_output (`torch.Tensor` or tuple of them): The prediction: one head of shape `(batch, channels,
                height, width)`; two as a tuple of such, or one after the other as `(batch, 2 * channels, ...)`.
            timestep (`int` or scalar `torch.Tensor`): The time that the model was given.
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): The state at `timestep`. Values that
                the last step returned are taken up unrounded; others as they are.
            degraded (`torch.Tensor` of the same shape, *optional*): y; None is 0, for generation.
            eta (`float`): Part of the noise that is drawn anew, in [0, 1]; 0 is deterministic. For models of DDPM,
                DDIM's. Without effect in the ancestral sampler (see `set_timesteps`).
            use_clipped_model_output (`bool`): Models of DDPM: take the eps that belongs to the clipped clean sample.
            generator (`torch.Generator` or list of `batch` of them, *optional*): Source of the noise z.
            variance_noise (`torch.Tensor` of the same shape, *optional*): z itself.
            return_dict (`bool`): Return an [`RDDMSchedulerOutput`] rather than a tuple.

        Returns:
            [`RDDMSchedulerOutput`], or the tuple of its fields; in `sample.dtype`.

        Raises:
            ValueError: Before `set_timesteps`, for shapes that differ or another number of heads, for a time outside
                the training schedule, for `eta` outside [0, 1], or for two sources of noise.
        """
        require_like(sample, degraded=degraded, variance_noise=variance_noise)
        require_fraction("eta", eta)
        if generator is not None and variance_noise is not None:
            raise ValueError("`step` takes either `generator` or `variance_noise`, got both: pass one.")
        heads = self.split_heads(model_output, sample)
        time, after = self._enter(timestep)
        x = self._unrounded(sample)
        parts = clean, residual, eps = self._split(heads, x, degraded, time, use_clipped_model_output)
        if after < 0 and not self._of_ddpm:
            state, variance = clean, 0.0
        elif self._ancestral:
            state, variance = self._ancestral_mean(x, clean, residual, time, after)
        else:
            state, variance = self._skip(x, residual, eps, (time, after), eta)
        if variance > 0:
            state = state + variance**0.5 * noise_like(heads[0], generator, variance_noise).to(x)
        return self._result(state, parts, sample, keep=after >= 0, return_dict=return_dict)

    def step_residual(
        self,
        model_output: Heads,
        timestep: int | float | Tensor,
        sample: Tensor,
        degraded: Tensor | None = None,
        return_dict: bool = True,
    ) -> RDDMSchedulerOutput | tuple[Tensor, ...]:
        """Take the residual alone off the sample: x - (A_t - A_s) R, and after the last time the predicted x0.

        The first of two sweeps over the same times, for models with a head for R and one for eps ("partially
        path-independent" generation); `step_noise` makes the second, and goes on from the result of the first.

        Arguments and results are those of `step`.

        Raises:
            ValueError: As `step`, and for a `prediction_type` that does not give R and eps apart.
        """
        return self._sweep_step("residual", model_output, timestep, sample, degraded, return_dict)

    def step_noise(
        self,
        model_output: Heads,
        timestep: int | float | Tensor,
        sample: Tensor,
        degraded: Tensor | None = None,
        return_dict: bool = True,
    ) -> RDDMSchedulerOutput | tuple[Tensor, ...]:
        """Take the noise alone off the sample: x - (B_t - B_s) eps, and after the last time the predicted x0.

        The second sweep of two; see `step_residual`, whose arguments, results and errors these are.
        """
        return self._sweep_step("noise", model_output, timestep, sample, degraded, return_dict)

    def _sweep_step(
        self, sweep: str, output: Heads, timestep: Any, sample: Tensor, degraded: Tensor | None, return_dict: bool
    ) -> RDDMSchedulerOutput | tuple[Tensor, ...]:
        if self.config.prediction_type not in TWO_HEADS[:2]:
            raise ValueError(
                "Residual and noise are removed one after the other with a head for each, `prediction_type`"
                f" {' or '.join(map(repr, TWO_HEADS[:2]))}, got {self.config.prediction_type!r}: use `step`."
            )
        require_like(sample, degraded=degraded)
        heads = self.split_heads(output, sample)
        time, after = self._enter(timestep, sweep, follows="residual" if sweep == "noise" else None)
        x = self._unrounded(sample)
        parts = clean, residual, eps = self._split(heads, x, degraded, time, False)
        alphas, betas2 = self._host[1:]
        if after < 0:
            state = clean
        elif sweep == "residual":
            state = x - (alphas[time] - alphas[after]) * residual
        else:
            state = x - (betas2[time] ** 0.5 - betas2[after] ** 0.5) * eps
        return self._result(state, parts, sample, keep=after >= 0 or sweep == "residual", return_dict=return_dict)

    def split_heads(self, model_output: Heads, sample: Tensor) -> tuple[Tensor, ...]:
        """The heads of a prediction: those of a tuple, or the halves of one tensor's channels.

        Args:
            model_output (`torch.Tensor` or tuple of them): See `step`.
            sample (`torch.Tensor` of shape `(batch, channels, ...)`): What each head must look like.

        Raises:
            ValueError: For another number of heads than `prediction_type` has, or another shape.
        """
        kind, count = self.config.prediction_type, 1 + (self.config.prediction_type in TWO_HEADS)
        if isinstance(model_output, Tensor):
            if count == 1:
                require_output_like(model_output, sample)
                return (model_output,)
            if model_output.shape != (len(sample), 2 * sample.shape[1], *sample.shape[2:]):
                raise ValueError(
                    f"`model_output` must hold the two heads of {kind!r}, as a tuple or as twice the channels of"
                    f" `sample`, {tuple(sample.shape)}, got {tuple(model_output.shape)}."
                )
            return model_output.chunk(2, dim=1)
        if len(model_output) != count:
            raise ValueError(f"`model_output` must hold {count} for {kind!r}, one a head, got {len(model_output)}.")
        for head in model_output:
            require_like(sample, model_output=head)
        return tuple(model_output)

    def _split(
        self, heads: Sequence[Tensor], x: Tensor, degraded: Tensor | None, time: int, use_clipped: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Clean sample, residual and noise that the heads stand for."""
        kind, clip = self.config.prediction_type, self._clip
        signal, a, b = self._host[0][time], self._host[1][time], self._host[2][time] ** 0.5
        first, last = heads[0].to(x.dtype), heads[-1].to(x.dtype)
        y: Any = 0.0 if degraded is None else degraded.to(x)
        if kind in PREDICTION_TYPES:
            return self._split_ddpm(first, x - (1 - signal) * y, y, (signal, b), use_clipped)
        if kind == "pred_noise":
            clean = clip((x - a * y - b * first) / signal)
            return clean, clip(y - clean), first
        if kind == "pred_res":
            residual = clip(first)
            # where there is no noise yet (b = 0, by the ratio of the schedule), there is none to be found
            eps = (x - y + (1 - a) * residual) / b if b > 0 else torch.zeros_like(x)
            return clip(y - residual), residual, eps
        eps = last - first if "add" in kind else last
        if "x0" in kind:
            return clip(first), clip(y - first), eps
        residual = clip(first)
        return clip(x - a * residual - b * eps), residual, eps

    def _split_ddpm(
        self, output: Tensor, x: Tensor, y: Any, levels: tuple[float, float], use_clipped: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same for a model of DDPM; x is the state without the part of y in it."""
        signal, sigma = levels
        if self.config.prediction_type == "epsilon":
            clean, eps = (x - sigma * output) / signal, output
        elif self.config.prediction_type == "sample":
            clean, eps = output, (x - signal * output) / sigma
        else:
            clean, eps = signal * x - sigma * output, signal * output + sigma * x
        clean = self._clip(clean)
        if use_clipped:
            eps = (x - signal * clean) / sigma
        return clean, y - clean, eps

    def _clip(self, values: Tensor) -> Tensor:
        limit = self.config.clip_sample_range
        return values.clamp(-limit, limit) if self.config.clip_sample else values

    def _skip(
        self, x: Tensor, residual: Tensor, eps: Tensor, times: tuple[int, int], eta: float
    ) -> tuple[Tensor, float]:
        """The next state without its noise, and the variance of that."""
        (_, alphas, betas2), (time, after) = self._host, times
        target = (alphas[after], betas2[after]) if after >= 0 else (0.0, 0.0)
        if after < 0 and not self.config.set_alpha_to_one:
            target = alphas[0], betas2[0]
        now, then, variance = betas2[time], target[1], 0.0
        if eta > 0 and then > 0:
            added = now - then
            variance = eta**2 * then / now * added / (1 - then) if self._of_ddpm else eta * added * then / now
        kept = max(then - variance, 0.0) ** 0.5
        return x - (alphas[time] - target[0]) * residual - (now**0.5 - kept) * eps, variance

    def _ancestral_mean(
        self, x: Tensor, clean: Tensor, residual: Tensor, time: int, after: int
    ) -> tuple[Tensor, float]:
        """The same for the ancestral sampler."""
        _, alphas, betas2 = self._host
        now, then = betas2[time], betas2[after]
        a, b = alphas[time] - alphas[after], now - then
        mean = (then / now) * x + ((b * alphas[after] - then * a) / now) * residual + (b / now) * clean
        return mean, max(b * then / now, 1e-20)

    def _result(
        self, state: Tensor, parts: Sequence[Tensor], sample: Tensor, *, keep: bool, return_dict: bool
    ) -> RDDMSchedulerOutput | tuple[Tensor, ...]:
        output = (self._hand_out(state, sample, keep=keep), *(part.to(sample.dtype) for part in parts))
        return RDDMSchedulerOutput(*output) if return_dict else output

    # Training

    def add_noise(
        self, original_samples: Tensor, noise: Tensor, timesteps: Tensor, degraded: Tensor | None = None
    ) -> Tensor:
        """The state at given times, x0 + A R + B noise = (1 - A) x0 + A y + B noise.

        Args:
            original_samples (`torch.Tensor` of shape `(batch, channels, height, width)`): x0.
            noise (`torch.Tensor` of the same shape): Standard normal.
            timesteps (`torch.Tensor` of shape `(batch,)` or `(1,)`): Times in [0, T - 1].
            degraded (`torch.Tensor` of the same shape as x0, *optional*): y; None is 0.

        Returns:
            x at these times, of the same shape, in the dtype of `original_samples`.

        Raises:
            ValueError: If the shapes differ, or a time lies outside the training schedule.
        """
        self._check_training(original_samples, timesteps, noise=noise, degraded=degraded)
        a, b = (self._at(table, timesteps, original_samples) for table in ("alphas_cumsum", "betas_cumsum"))
        dtype = original_samples.dtype
        sample = (1 - a).to(dtype) * original_samples + b.to(dtype) * noise
        return sample if degraded is None else sample + a.to(dtype) * degraded

    def training_target(
        self, original_samples: Tensor, noise: Tensor, timesteps: Tensor, degraded: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """What each head must put out for the state that `add_noise` makes of the same arguments.

        The loss is the sum of the heads' mean absolute (restoration) or squared (generation) errors; `split_heads`
        gives the heads of an output.

        Returns:
            One tensor for each head, of the shape of x0; nothing is clipped.

        Raises:
            ValueError: If the shapes differ, or a time lies outside the training schedule.
        """
        self._check_training(original_samples, timesteps, noise=noise, degraded=degraded)
        kind = self.config.prediction_type
        if kind == "v_prediction":
            return (self.get_velocity(original_samples, noise, timesteps),)
        if kind in ("epsilon", "pred_noise"):
            return (noise,)
        first = original_samples
        if "res" in kind:
            first = -original_samples if degraded is None else degraded - original_samples
        if kind in ("sample", "pred_res"):
            return (first,)
        return first, first + noise if "add" in kind else noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Target of v-prediction for models of DDPM, sqrt(A') noise - sqrt(1 - A') x0; arguments as in `add_noise`.

        Raises:
            ValueError: If the noise's schedule is not one of betas.
        """
        if self.alphas_cumprod is None:
            raise ValueError("Velocities are defined for a schedule of betas: `beta_schedule` is not one here.")
        self._check_training(sample, timesteps, noise=noise)
        alpha, dtype = self._at("alphas_cumprod", timesteps, sample), sample.dtype
        return alpha.sqrt().to(dtype) * noise - (1 - alpha).sqrt().to(dtype) * sample
