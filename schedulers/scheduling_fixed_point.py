"""Fixed-point inversion of DDIM: exact as far as its iterations converge, at several network calls a step.

Pan, Gherardi, Xie, Huang, "Effective Real Image Editing with Accelerated Iterative Diffusion Inversion", ICCV 2023,
arXiv 2309.04907 (AIDI), and Garibi, Patashnik, Voynov, Averbuch-Elor, Cohen-Or, "ReNoise: Real Image Inversion Through
Iterative Noising", ECCV 2024, arXiv 2403.14602. The DDIM step from t to its cleaner neighbour s, x_s = Phi(x_t), is
undone by solving it for x_t. With a = sqrt(A), sigma = sqrt((1 - A) / A) and e the noise that the network predicts:

    x_t = (a_t / a_s) x_s + a_t (sigma_t - sigma_s) e(x_t, t)
    y_0 = x_s,   y_(k+1) = (a_t / a_s) x_s + a_t (sigma_t - sigma_s) e(y_k, t),   x_t ~ y_K

For flows and EDM a = 1 and e is the slope, and Phi is the Euler step. The iteration converges where a_t (sigma_t -
sigma_s) times the Lipschitz constant of e is below 1, the faster the smaller it is: take more steps, or less guidance,
if `residual` stays large. K = 1 is the usual DDIM inversion, whose network is told the time it goes to.
A baseline: of AIDI without Anderson's acceleration and blended guidance, of ReNoise with the averaged predictions but
without its regularisation and without the correction of stochastic samplers' noise. Neighbours come from the list of
times, states are float64.
"""

from typing import Any, Literal

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from .levels import Given, Level
from .noise_schedule import state_dtype
from .reversible import Latent, LatentPair, ReversibleMixin, ReversibleSchedulerOutput

__all__ = ["FixedPointScheduler", "LatentPair", "ReversibleSchedulerOutput"]


class FixedPointScheduler(ReversibleMixin, SchedulerMixin, ConfigMixin):
    """DDIM, Euler for flows and EDM; with `inverse=True` its inverse by fixed-point iteration (AIDI, ReNoise).

    Stands in for stock schedulers: `pipe.scheduler = FixedPointScheduler.from_config(pipe.scheduler.config)`. To
    invert, hand a pipeline with `inverse=True` clean latents. Each time then occurs `num_iterations` times in
    `timesteps`, as `order` says. The result is a single latent: the pipeline's output, or unrounded `pair.first`
    (`pair.second` is the same), which [`~FixedPointScheduler.set_pair`] of the sampling scheduler takes.

    Args:
        num_train_timesteps (`int`): Length T of the training schedule.
        beta_start, beta_end, beta_schedule, trained_betas: The betas, as in stock schedulers.
        clip_sample, thresholding (`bool`): Must be False by the time of `set_timesteps`: clipping can't be undone.
        set_alpha_to_one (`bool`): The last step goes to A = 1 (clean data); otherwise to A[0].
        steps_offset (`int`): Added to every time of the `"leading"` grid (Stable Diffusion: 1).
        prediction_type (`str`): `"epsilon"`, `"sample"` or `"v_prediction"`; for EDM the first or the last.
        timestep_spacing (`str`): `"leading"`, `"linspace"` or `"trailing"`, as in stock schedulers.
        rescale_betas_zero_snr (`bool`): Rescale the betas to A[T - 1] = 0 (arXiv 2305.08891).
        process (`str`): `"vp"` (betas), `"flow"` or `"edm"`; `from_config` tells it from a stock config.
        shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len, shift_terminal: As
            in stock `FlowMatchEulerDiscreteScheduler`, for flows alone.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, time_shift_type: Likewise.
        sigma_min, sigma_max, sigma_data, sigma_schedule, rho: As in stock `EDMEulerScheduler`, for EDM alone.
        skip_steps (`int`): Leave out so many of the noisiest steps: `N - int(N * strength)` of them for a `strength`.
        inverse (`bool`): Walk from the clean end to the noise: hand a pipeline clean latents as `latents`.
        on_edit (`str`): What to do if the latents were changed between two calls, as pipelines for inpainting with a
            four-channel network do: `"raise"` an error, or `"adopt"` them, after which the run can't be undone.
        num_iterations (`int`): K, network calls for each step of an inversion. 1 is the usual DDIM inversion.
        average_last (`int`): An inversion's step uses the mean of the slopes that its last so many iterations found
            (ReNoise), 1 to `num_iterations`. It steadies iterates that swing around the solution; where they close in
            from one side it only holds them back.

    Attributes:
        order (`int`): Network calls a step: `num_iterations` if `inverse`, else 1.

    Raises:
        ValueError: For a value outside what is listed above.
    """

    _fewest_steps = 1
    _MESSAGES = {
        **ReversibleMixin._MESSAGES,
        "edited": "The latents were changed between two steps, so {name} would not come back to where it started. Use"
        " another scheduler with this pipeline or callback, or on_edit='adopt', which goes on with them.",
    }

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        thresholding: bool = False,
        timestep_spacing: Literal["leading", "linspace", "trailing"] = "leading",
        rescale_betas_zero_snr: bool = False,
        process: Literal["vp", "flow", "edm"] = "vp",
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int | None = 256,
        max_image_seq_len: int | None = 4096,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: Literal["karras", "exponential"] = "karras",
        rho: float = 7.0,
        skip_steps: int = 0,
        inverse: bool = False,
        on_edit: Literal["raise", "adopt"] = "raise",
        num_iterations: int = 5,
        average_last: int = 1,
    ) -> None:
        if num_iterations < 1 or num_iterations % 1:
            raise ValueError(f"`num_iterations` must be a whole number of network calls >= 1, got {num_iterations}.")
        if not 1 <= average_last <= num_iterations or average_last % 1:
            raise ValueError(
                f"`average_last` must be a whole number in [1, {num_iterations}] (`num_iterations`), got"
                f" {average_last}."
            )
        self.order = int(num_iterations) if inverse else 1
        self._start()

    def _make_levels(self, steps: int | None, timesteps: Given, sigmas: Given, mu: float | None) -> list[Level]:
        levels = super()._make_levels(steps, timesteps, sigmas, mu)
        if not 0 <= self.config.skip_steps < len(levels) - 1:
            raise ValueError(
                f"`skip_steps` must leave one of the {len(levels) - 1} steps at least, got {self.config.skip_steps}."
            )
        return levels

    def _call_levels(self) -> list[int]:
        """An inversion calls the network at the level that each of its steps goes to."""
        if not self.config.inverse:
            return super()._call_levels()
        return [index for index in self._path[1:] for _ in range(self.order)]

    def _plan(self) -> None:
        """Coefficients of each step: on state and output if sampling, on source and slope if inverting."""
        if self.config.inverse and self._levels[0].signal == 0:
            raise ValueError(
                "DDIM can't be inverted to a time without signal (A = 0), where all states agree: use"
                " rescale_betas_zero_snr=False or end below it (steps_offset, timestep_spacing)."
            )
        pairs = [(self._levels[a], self._levels[b]) for a, b in zip(self._path, self._path[1:], strict=False)]
        self._steps = [_undo(*pair) if self.config.inverse else pair[0].to(pair[1]) for pair in pairs]

    def _forget(self) -> None:
        super()._forget()
        self._residuals: list[Tensor] = []
        self._now: Latent | None = None
        self._source: Tensor | None = None  # x_s of the step in progress
        self._slopes: Tensor | None = None  # sum of the slopes to average

    @property
    def residual(self) -> Tensor | None:
        """How far the last two iterates y_K and y_(K-1) of each step of an inversion lay apart; None without a step.

        `(steps, batch)`, float64, on the device of the samples: the largest ``|y_K - y_(K-1)|`` of each sample,
        before averaging. It is a_t / a_s times the error with which one DDIM step from y_(K-1) comes back to x_s, and
        for K = 1 the length of the step. Nothing is read back from the device before the caller does so.
        """
        return torch.stack(self._residuals) if self._residuals else None

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> ReversibleSchedulerOutput | tuple[Tensor, ...]:
        """Take the sample to the next time: towards the data, or, if `inverse`, one iteration on the way to the noise.

        Args:
            model_output (`torch.Tensor` of shape `(batch, channels, height, width)`): The model's prediction.
            timestep (`float` or scalar `torch.Tensor`): The time that the model was given, of `timesteps`.
            sample (`torch.Tensor` of the same shape): What the last call returned, in the model's units.
            eta (`float`): Must be 0.
            use_clipped_model_output (`bool`): Without effect, as nothing is clipped; pixel-space pipelines pass it.
            generator (`torch.Generator`, *optional*): Without effect, as nothing is drawn.
            return_dict (`bool`): Return a [`ReversibleSchedulerOutput`] rather than a tuple.

        Returns:
            [`ReversibleSchedulerOutput`], or a tuple with its `prev_sample`: x_s, or the iterate y_k to feed to the
            network next; samples in `sample.dtype`.

        Raises:
            ValueError: Before `set_timesteps`, for `eta` > 0, if an inversion begins in the middle of a step, or if
                `sample` is not what the last call returned.
        """
        position, begins = self._enter(model_output, timestep, sample, eta)
        output = model_output.to(state_dtype(sample.device))
        if begins or self._now is None:
            state = self._begin_run(position, sample)
        else:
            state = self._recognise(sample, self._now)
        level = self._levels[self._calls[position]]
        if self.config.inverse:
            target = self._iterate(position, level, state.value, output)
        else:
            target = _combine(self._steps[position], state.value, output)
        self._now = Latent(target)
        if position + 1 == len(self.timesteps):
            self.pair = LatentPair(self._now, self._now, (position + 1 - self._begin) // self.order)
        previous = self._leave(self._now, sample)
        if not return_dict:
            return (previous,)
        return ReversibleSchedulerOutput(previous, _combine(level.clean, state.value, output).to(sample.dtype))

    def _begin_run(self, position: int, sample: Tensor) -> Latent:
        """The first state: what the pair that was set holds unrounded, or the sample."""
        if position % self.order:
            raise ValueError(
                f"Each step calls the network {self.order} times, so an inversion can't begin at call {position}: give"
                f" `set_begin_index` a multiple of {self.order}."
            )
        pending = self._take_pair()
        if pending is None:
            return Latent(sample.to(state_dtype(sample.device), copy=True))  # the caller may write to it
        value = pending.first.value.to(sample.device, state_dtype(sample.device))
        if value.shape != sample.shape:
            self._fail("pair")
        self._alarm("pair", (sample != value.to(sample.dtype)).any())
        return Latent(value)

    def _iterate(self, position: int, level: Level, y: Tensor, output: Tensor) -> Tensor:
        """y_(k+1) from y_k; after the last iteration of a step, the state that the step ends with."""
        step, iteration = divmod(position, self.order)
        left = self.order - 1 - iteration
        if iteration == 0 or self._source is None:
            self._source, self._slopes = y, None
        ratio, gain = self._steps[step]
        slope = _combine(level.slope, y, output)
        following = torch.add(ratio * self._source, slope, alpha=gain)
        count = self.config.average_last
        if left < count - 1 and self._slopes is not None:
            slope = self._slopes + slope
        self._slopes = slope
        if left > 0:
            return following
        self._residuals.append((following - y).abs().flatten(1).amax(1))  # (B,)
        return following if count == 1 else torch.add(ratio * self._source, slope, alpha=gain / count)


def _undo(now: Level, target: Level) -> tuple[float, float]:
    """Coefficients, on the state here and on the slope there, of the noisier state whose DDIM step leads here."""
    ratio = target.signal / now.signal
    return ratio, target.noise - ratio * now.noise


def _combine(coefficients: tuple[float, float], x: Tensor, output: Tensor) -> Tensor:
    if coefficients == (0.0, 1.0):
        return output
    return torch.add(coefficients[0] * x, output, alpha=coefficients[1])
