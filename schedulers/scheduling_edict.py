"""EDICT: exact inversion by two coupled latents, at two network calls a step.

Wallace, Gokul, Naik, "EDICT: Exact Diffusion Inversion via Coupled Transformations", CVPR 2023, arXiv 2211.12446. With
s the cleaner neighbour of t, r = alpha_s / alpha_t, c = sigma_s - r sigma_t and mixing p, a step is

    x' = r x + c eps(y, t)       x'' = p x' + (1 - p) y'
    y' = r y + c eps(x', t)      y'' = (1 - p) x'' + p y'

and undoing it solves the four lines from the last to the first. In every other step (leapfrog; i even: as written, i
odd: y before x) the latents change roles, counted from the noisiest step of the run in both directions. For flows and
EDM r = 1, c = sigma_s - sigma_t and eps is the slope. Errors grow by p^-2 a step on the way to the noise.
Deviations from the released program (commit c35a81f): neighbours come from the list of times, where theirs lie T / N
lower, between the entries of the table, which it interpolates with the weights swapped (`released=True`, with
`set_alpha_to_one=False`). diffusers' community pipeline counts its inversion's steps the other way round, which is
inexact for odd numbers of them; ours is not.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Literal

import numpy as np
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from .coupled import Call, CoupledMixin, Move
from .levels import Given, Level
from .noise_schedule import require_fraction, state_dtype
from .reversible import Latent, LatentPair, ReversibleSchedulerOutput

__all__ = ["EDICTScheduler", "LatentPair", "ReversibleSchedulerOutput"]


class EDICTScheduler(CoupledMixin, SchedulerMixin, ConfigMixin):
    """Exactly invertible DDIM by coupled latents (EDICT, arXiv 2211.12446), at two network calls a step.

    Stands in for stock schedulers: `pipe.scheduler = EDICTScheduler.from_config(pipe.scheduler.config)`. Each time
    occurs twice in `timesteps`, once for each latent. To invert, hand a pipeline with `inverse=True` clean latents;
    then `pair` holds both latents that [`~EDICTScheduler.set_pair`] of the sampling scheduler asks for. Two pipelines
    mistake a scheduler of two calls a step: SDXL's refiner with `denoising_start` expects Heun's layout of times, so
    it is refused; Flux's image-to-image pipeline takes calls for steps: give it `1 - (1 - strength) / 2`.

    Args:
        num_train_timesteps (`int`): Length T of the training schedule.
        beta_start, beta_end, beta_schedule, trained_betas: The betas, as in stock schedulers.
        clip_sample, thresholding (`bool`): Must be False by the time of `set_timesteps`: clipping can't be undone.
        set_alpha_to_one (`bool`): The last step goes to A = 1 (clean data); otherwise to A[0].
        steps_offset (`int`): Added to every time of the `"leading"` grid (Stable Diffusion: 1).
        prediction_type (`str`): `"epsilon"`, `"sample"` or `"v_prediction"`; for EDM the first or the last; for flows,
            which predict a velocity whatever it says, also `"flow_prediction"`.
        timestep_spacing (`str`): `"leading"`, `"linspace"` or `"trailing"`, as in stock schedulers.
        rescale_betas_zero_snr (`bool`): Rescale the betas to A[T - 1] = 0 (arXiv 2305.08891).
        process (`str`): `"vp"` (betas), `"flow"` or `"edm"`; `from_config` tells it from a stock config.
        shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len, shift_terminal: As
            in stock `FlowMatchEulerDiscreteScheduler`, for flows alone.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, time_shift_type: Likewise.
        sigma_min, sigma_max, sigma_data, sigma_schedule, rho: As in stock `EDMEulerScheduler`, for EDM alone.
        skip_steps (`int`): Leave out so many of the noisiest steps: `N - int(N * strength)` of them for a `strength`.
        inverse (`bool`): Walk from the clean end to the noise: hand a pipeline clean latents as `latents`.
        on_edit (`str`): What to do if the latents were changed between two steps, as pipelines for inpainting with a
            four-channel network do: `"raise"` an error, or `"adopt"` them, which gives up exact inversion.
        mixing_coeff (`float`): p, in (0, 1]: how little the latents are drawn together in each step. The paper's 0.93
            is for 50 steps; for N of them `0.93 ** (50 / N)` couples as strongly. 1 does not mix.
        leapfrog_steps (`bool`): Change the roles of the latents in every other step.
        released (`bool`): Times 0, T // N, ... and neighbours T / N lower, as in the released program.

    Attributes:
        condition_number (`float`): How much a difference of the latents grows on the way to the noise, p^(-2 N).

    Raises:
        ValueError: For a value outside what is listed above.
    """

    order = 2

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
        prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon",
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
        mixing_coeff: float = 0.93,
        leapfrog_steps: bool = True,
        released: bool = False,
    ) -> None:
        require_fraction("mixing_coeff", mixing_coeff)
        if mixing_coeff == 0:
            raise ValueError("`mixing_coeff` must be above 0: at 0 one latent would be lost.")
        self._start()

    def _make_levels(self, steps: int | None, timesteps: Given, sigmas: Given, mu: float | None) -> list[Level]:
        if self.config.released and steps is not None:
            count = self.config.num_train_timesteps
            timesteps, steps = np.arange(0, count, count // steps)[::-1].tolist(), None
        return super()._make_levels(steps, timesteps, sigmas, mu)

    def _call_levels(self) -> list[int]:
        steps = range(len(self._levels) - 1)
        return [index for index in (reversed(steps) if self.config.inverse else steps) for _ in range(2)]

    def _plan(self) -> None:
        levels = self._levels
        if levels[0].signal == 0:
            raise ValueError(
                "EDICT needs some signal at every time, and A = 0 at the first: use rescale_betas_zero_snr=False or"
                " start below it (steps_offset, timestep_spacing)."
            )
        self._steps = []  # (r, c) of each step
        for now, target in pairwise(levels):
            signal, noise = self._released_target(now) if self.config.released else (target.signal, target.noise)
            ratio = signal / now.signal
            self._steps.append((ratio, noise - ratio * now.noise))
        self.condition_number = self.config.mixing_coeff ** (-2 * len(self._steps))
        self._warn_if_lost()

    def _released_target(self, now: Level) -> tuple[float, float]:
        """Signal and noise at the time T / N below `now`, by the program's interpolation, which swaps the weights."""
        count, alphas = self.config.num_train_timesteps, self.alphas_cumprod
        steps = count // int(self._levels[0].time - self._levels[1].time)
        time = max(float(np.float32(now.time) - np.float32(count / steps)), 0.0)
        part = time % 1 or 1.0  # a whole time is looked up as it is
        alpha = (part * alphas[int(time)] + (1 - part) * alphas[min(int(time) + 1, count - 1)]).item()
        return alpha**0.5, (1 - alpha) ** 0.5

    def calls(self, begin: int = 0) -> list[Call]:
        """See `CoupledMixin.calls`: two calls a step, then the mixing, or, inverting, its undoing."""
        if begin % 2:
            raise ValueError(
                f"EDICT calls the network twice a step and can't begin at call {begin}, in the middle of one; give"
                " `set_begin_index` an even index (pipelines that assume Heun's layout of timesteps do not)."
            )
        inverse, run = self.config.inverse, []
        origin = 0 if inverse else self._calls[begin]
        for index in self._calls[begin::2]:
            leader, follower = (0, 1) if self._leads_with_x(index - origin) else (1, 0)
            slope, (ratio, gain) = self._levels[index].slope, self._steps[index]
            moved = Call(follower, ratio, gain * slope[0], gain * slope[1])
            if inverse:
                moved = Call(leader, 1 / ratio, -gain / ratio * slope[0], -gain / ratio * slope[1])
            last = inverse and index == 0
            run += [moved, replace(moved, seen=1 - moved.seen, then=() if last else self._mixing())]
        return run

    def _leads_with_x(self, step: int) -> bool:
        return step % 2 == 0 or not self.config.leapfrog_steps

    def _mixing(self) -> tuple[Move, ...]:
        """The moves that draw the latents together, or, inverting, apart again."""
        p = self.config.mixing_coeff
        if p == 1:
            return ()
        if self.config.inverse:
            return Move(1, 1 / p, (p - 1) / p), Move(0, 1 / p, (p - 1) / p)
        return Move(0, p, 1 - p), Move(1, p, 1 - p)

    def set_pair(self, pair: LatentPair | tuple[Tensor, Tensor]) -> Tensor:
        """Give the next run both latents, x and y, to start from: `scheduler.pair` of the opposite run.

        Args:
            pair: A `LatentPair`, or two tensors of one shape `(batch, channels, height, width)`.

        Returns:
            The tensor, float64, to hand to the pipeline as `latents`: what the network sees first.

        Raises:
            ValueError: If the shapes differ, or an inversion is given a pair that does not tell its number of steps.
        """
        super().set_pair(pair)
        assert self._pending is not None
        if not self.config.inverse:
            return self._pending.second.value  # the first call moves x by what the network makes of y
        if self._pending.steps is None and self.config.leapfrog_steps:
            raise ValueError("To invert, EDICT must know how many steps a pair was made with: give a LatentPair.")
        self._latents = [Latent(latent.value.clone()) for latent in self._pending[:2]]
        self._apply(self._mixing())
        return self._latents[0 if self._leads_with_x((self._pending.steps or 1) - 1) else 1].value

    def _begin_run(self, sample: Tensor) -> None:
        pending = self._take_pair()
        given = (sample, sample) if pending is None else tuple(latent.value for latent in pending[:2])
        dtype = state_dtype(sample.device)
        self._latents = [Latent(value.to(sample.device, dtype, copy=True)) for value in given]
        if self.config.inverse:
            self._apply(self._mixing())
        if pending is not None:
            self._check_pair(sample, self._latents[self._run[0].seen])

    def result_of(self, run: list[Call]) -> int:
        """Always x."""
        return 0
