"""Edit-friendly DDPM inversion: the noise maps with which stochastic sampling draws a given picture.

Huberman-Spiegelglas, Kulikov, Michaeli, "An Edit Friendly DDPM Noise Space: Inversion and Manipulations", CVPR 2024,
arXiv 2304.06140. With A = `alphas_cumprod` at time t, A' at its cleaner neighbour t', z0 the picture, and p and e the
clean sample and the noise that the network predicts from x_t, every state is noised on its own, not from the last one:

    x_t = sqrt(A) z0 + sqrt(1 - A) n_t                                       n_t independent for each t
    mu = sqrt(A') p + sqrt(1 - A' - s^2) e,   s^2 = eta^2 (1 - A') / (1 - A) (1 - A / A')
    z_t = (x_t' - mu) / s,   x_t' <- mu + s z_t                              the second against drift by rounding

Sampling, x_t' = mu + s z_t, with the same network then passes through the same states; with another prompt it edits.
The last map is 0, as in the paper's program, so that the run ends with mu: z0 itself comes back only up to s z of that
step, and up to the network's error at the last time where s = 0 (A' = 1).
Differences from the released program (commit 58fc881; written from the equations, not from its code): eta multiplies
s throughout, where it has eta and eta^2 side by side (the same at eta = 1); neighbours come from the list of times;
other predictions than epsilon; states in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .levels import Given, Level, vp_levels
from .noise_schedule import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    SPACINGS,
    check_choices,
    entry_of,
    noise_schedule,
    require_betas,
    require_fraction,
    require_output_like,
    settings_for,
    state_dtype,
)

__all__ = ["EditFriendlyDDPMScheduler", "EditFriendlyDDPMSchedulerOutput"]

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class EditFriendlyDDPMSchedulerOutput(BaseOutput):
    """Output of [`EditFriendlyDDPMScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` of shape `(batch, channels, height, width)`): The sample to feed to the next step.
        pred_original_sample (`torch.Tensor` of the same shape): The clean sample that the model predicts.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


@dataclass(frozen=True)
class _Step:
    """A step's coefficients on x_t and on the model's output, those of p, and s."""

    mean: tuple[float, float]
    clean: tuple[float, float]
    deviation: float


class EditFriendlyDDPMScheduler(SchedulerMixin, ConfigMixin):
    """DDPM with stored noise maps and, with `inverse=True`, their extraction from a picture (arXiv 2304.06140).

    Both directions run over falling times, in a stock pipeline or any loop. To extract the maps of clean latents:

        inverse = EditFriendlyDDPMScheduler.from_config(pipe.scheduler.config, inverse=True)
        inverse.set_timesteps(100)
        x = inverse.set_source(latents, generator)     # (B, C, H, W)
        pipe.scheduler = inverse
        pipe(source_prompt, latents=x.to(pipe.dtype), num_inference_steps=100, ...)

    and to sample with them, in the same number of steps:

        pipe.scheduler = EditFriendlyDDPMScheduler.from_config(inverse.config, inverse=False)
        x = pipe.scheduler.set_noises(inverse.initial, inverse.noises, inverse.timesteps)
        pipe(target_prompt, latents=x.to(pipe.dtype), num_inference_steps=100, ...)

    Editing leaves out the noisiest steps (the paper: 36 of 100, guidance 3.5 and then 15): give both schedulers
    `skip_steps`, or the second alone with `set_noises(inverse.trajectory[skip], inverse.noises[skip:])`, or, in a loop
    of one's own, use `set_begin_index(skip)`. Clean samples are not clipped.

    Args:
        num_train_timesteps (`int`): Length T of the training schedule.
        beta_start, beta_end, beta_schedule, trained_betas: The betas, as in stock schedulers.
        set_alpha_to_one (`bool`): The last step goes to A = 1 (clean data); otherwise to A[0].
        steps_offset (`int`): Added to every time of the `"leading"` grid (Stable Diffusion: 1).
        prediction_type (`str`): `"epsilon"`, `"sample"` or `"v_prediction"`.
        timestep_spacing (`str`): `"leading"`, `"linspace"` or `"trailing"`, as in stock schedulers.
        rescale_betas_zero_snr (`bool`): Rescale the betas to A[T - 1] = 0 (arXiv 2305.08891).
        skip_steps (`int`): Leave out so many of the noisiest steps: `N - int(N * strength)` of them for a `strength`.
        inverse (`bool`): Extract the noise maps of the source.
        eta (`float`): Part of DDPM's standard deviation, in [0, 1]: 1 is DDPM, 0 DDIM, which has no maps to extract.

    Attributes:
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
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        timestep_spacing: Literal["leading", "linspace", "trailing"] = "leading",
        rescale_betas_zero_snr: bool = False,
        skip_steps: int = 0,
        inverse: bool = False,
        eta: float = 1.0,
    ) -> None:
        check_choices(
            self.config, beta_schedule=BETA_SCHEDULES, prediction_type=PREDICTION_TYPES, timestep_spacing=SPACINGS
        )
        require_fraction("eta", eta)
        if inverse and eta == 0:
            raise ValueError("At eta=0 no noise is added, so there are no noise maps to extract: take `eta` above 0.")
        self.betas, self.alphas_cumprod = noise_schedule(self.config)  # (T,) each, float64 on the CPU
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._levels: list[Level] = []
        self._source: tuple[Tensor, Generators] | None = None
        self._drawn: tuple[list[float], Tensor] | None = None  # times, and the states there, (steps, B, C, H, W)
        self._maps: tuple[Tensor, Tensor, list[float] | None] | None = None  # initial, noises, their times
        self._forget()

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in [`ConfigMixin`], but raises a ValueError for a flow-matching or EDM config: no betas, no DDPM."""
        config = settings_for(cls, config)
        require_betas(cls, config)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    # What a run works with

    def set_source(self, latents: Tensor, generator: Generators = None) -> Tensor | None:
        """Tell an inversion the pictures whose noise maps it is to find; they hold until they are replaced.

        Args:
            latents (`torch.Tensor` of shape `(batch, channels, height, width)`): z0, clean, in the model's units.
            generator (`torch.Generator` or list of `batch` of them, *optional*): Source of the n_t, used when the
                states at the times of a run are first asked for: once, however often a run over these times is begun.

        Returns:
            What `initial_latents` returns if the times of the run are known already, else None.

        Raises:
            ValueError: If the scheduler is not one with `inverse=True`.
        """
        if not self.config.inverse:
            raise ValueError("Noise maps are extracted by a scheduler with inverse=True: set the source there.")
        self._source = latents.detach().to(state_dtype(latents.device), copy=True), generator
        self._drawn = None
        self._forget_run()
        return None if self.num_inference_steps is None else self.initial_latents()

    def initial_latents(self) -> Tensor:
        """The noised source at the first time of the run: what to hand a pipeline as `latents` for an inversion.

        Returns:
            x_T, or x_t at the time of `begin_index`: `(batch, channels, height, width)`, float64 (cast to the dtype of
            the pipeline's model).

        Raises:
            ValueError: Before `set_source` or `set_timesteps`.
        """
        return self._states()[self.begin_index or 0].clone()

    def set_noises(self, initial: Tensor, noises: Tensor, timesteps: Given = None) -> Tensor:
        """Give sampling the maps to use in place of random noise; they hold until they are replaced.

        The last map belongs to the last step. A run that begins later than the first map uses the later ones, and
        begins with the sample that it is handed, in place of `initial`.

        Args:
            initial (`torch.Tensor` of shape `(batch, channels, height, width)`): The state at the first map's time.
            noises (`torch.Tensor` of shape `(steps, batch, channels, height, width)`): The maps, noisiest first.
            timesteps (list or tensor of shape `(steps,)`, *optional*): Their times: a run at others is refused.

        Returns:
            `initial`, float64, to hand to the pipeline as `latents` (cast to the dtype of its model).

        Raises:
            ValueError: If the shapes do not fit together, or the scheduler is one with `inverse=True`.
        """
        if self.config.inverse:
            raise ValueError("A scheduler with inverse=True extracts noise maps: give them to one with inverse=False.")
        times = None if timesteps is None else [float(time) for time in torch.as_tensor(timesteps).tolist()]
        if noises.ndim != initial.ndim + 1 or noises.shape[1:] != initial.shape or len(noises) == 0:
            raise ValueError(
                "`noises` must have the shape of `initial` behind a dimension of steps, got"
                f" {tuple(noises.shape)} and {tuple(initial.shape)}."
            )
        if times is not None and len(times) != len(noises):
            raise ValueError(f"Each noise map has one time, got {len(noises)} maps and {len(times)} times.")
        initial, noises = (part.detach().to(state_dtype(part.device), copy=True) for part in (initial, noises))
        self._maps = initial, noises, times
        self._forget()
        return initial.clone()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Given = None,
    ) -> None:
        """Set the times of the next run and forget the last one; call it before every run, as pipelines do.

        Source and noise maps are kept, and so are the states drawn of the source if the times are the same.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps N.
            device (`str` or `torch.device`, *optional*): Where `timesteps` lives.
            timesteps (list or tensor of shape `(N,)`, *optional*): The times themselves, strictly falling.

        Raises:
            ValueError: If not exactly one of steps and times is given, the times do not fit the training schedule,
                `skip_steps` leaves none, or the first time has no signal and the model predicts epsilon.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("`set_timesteps` takes either `num_inference_steps` or `timesteps`: pass exactly one.")
        final = 1.0 if self.config.set_alpha_to_one else self.alphas_cumprod[0].item()
        levels = vp_levels(
            self.config, self.alphas_cumprod, num_inference_steps, timesteps, final_alpha=final, clean_time=0
        )
        if not 0 <= self.config.skip_steps < len(levels) - 1:
            raise ValueError(
                f"`skip_steps` must leave one of the {len(levels) - 1} steps at least, got {self.config.skip_steps}."
            )
        self._levels = levels[self.config.skip_steps :]
        pairs = zip(self._levels, self._levels[1:], strict=False)
        self._steps = [_step(now, target, self.config.eta) for now, target in pairs]
        self._times = [level.time for level in self._levels[:-1]]  # on the host
        self.num_inference_steps = len(self._times)
        self.timesteps = torch.tensor(self._times, dtype=torch.int64, device=device)
        self._forget()

    def _states(self) -> Tensor:
        """x_t at the times of the run, each noised on its own; drawn once."""
        if self._source is None:
            raise ValueError("Call `set_source` first: an inversion must know the pictures whose maps it is to find.")
        if self.num_inference_steps is None:
            raise ValueError("Call `set_timesteps` first: the times of the run are not known yet.")
        if self._drawn is None or self._drawn[0] != self._times:
            source, generator = self._source
            states = torch.empty(len(self._times), *source.shape, dtype=source.dtype, device=source.device)
            for state, level in zip(states, self._levels, strict=False):
                noise = randn_tensor(source.shape, generator=generator, device=source.device, dtype=source.dtype)
                torch.add(level.signal * source, noise, alpha=level.noise, out=state)
            self._drawn = self._times, states
        return self._drawn[1]

    # The results of an inversion

    @property
    def noises(self) -> Tensor | None:
        """The maps z_t found so far, `(steps, batch, channels, height, width)`, float64; None before a step."""
        return torch.stack(self._found) if self._found else None

    @property
    def trajectory(self) -> Tensor | None:
        """The states passed so far, `(steps + 1, batch, channels, height, width)`, float64, noisiest first."""
        return torch.stack(self._passed) if self._passed else None

    @property
    def initial(self) -> Tensor | None:
        """The state at which the inversion began, `(batch, channels, height, width)`, float64."""
        return self._passed[0].clone() if self._passed else None

    # A run

    def _forget(self) -> None:
        self.step_index: int | None = None
        self.begin_index: int | None = None
        self._forget_run()

    def _forget_run(self) -> None:
        self._found: list[Tensor] = []
        self._passed: list[Tensor] = []
        self._state: Tensor | None = None  # the last result, unrounded
        self._given: Tensor | None = None  # the last sample seen
        self._returned: Tensor | None = None  # the last one returned, and its version
        self._version: int | None = None
        self._edited: Tensor | None = None  # on an accelerator: not yet read

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run at this index of `timesteps`."""
        self.begin_index = begin_index

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> EditFriendlyDDPMSchedulerOutput | tuple[Tensor, ...]:
        """Take the sample to the next time of the schedule; if `inverse`, and find the noise map that leads there.

        Args:
            model_output (`torch.Tensor` of shape `(batch, channels, height, width)`): The model's prediction.
            timestep (`int` or scalar `torch.Tensor`): The time that the model was given.
            sample (`torch.Tensor` of the same shape): The state at `timestep`. Values that the last step returned are
                taken up unrounded; others (a blend, a callback's edit) as they are, but an inversion refuses them.
            eta (`float`): The config's, which holds, or 0, which pipelines pass where their caller says nothing.
            use_clipped_model_output (`bool`): Without effect, as nothing is clipped; pixel-space pipelines pass it.
            generator (`torch.Generator` or list of `batch` of them, *optional*): Source of noise where no maps were
                set; without effect otherwise.
            return_dict (`bool`): Return an [`EditFriendlyDDPMSchedulerOutput`] rather than a tuple.

        Returns:
            [`EditFriendlyDDPMSchedulerOutput`], or a tuple with its `prev_sample`; samples in `sample.dtype`.

        Raises:
            ValueError: Before `set_timesteps` or, if `inverse`, `set_source`; for another `eta`; if an inversion is
                given other states than its own; if noise maps were set that do not fit the run, or its first sample is
                not theirs.
        """
        if self.num_inference_steps is None:
            raise ValueError("Call `set_timesteps` before `step`: the times of the run are not known yet.")
        if eta not in (0, self.config.eta):
            raise ValueError(
                f"`eta` is the scheduler's, {self.config.eta}, got {eta}: set it by `from_config(..., eta=)`."
            )
        require_output_like(model_output, sample)
        index = self._locate(timestep)
        retried = sample is self._given and sample is not self._returned
        if index != self.step_index or self._state is None or retried:
            self._begin(index, sample)
        else:
            self._continue(sample)
        x, step = self._state, self._steps[index]
        assert x is not None
        self.step_index, last = index + 1, index + 1 == len(self._steps)
        output = model_output.to(x.dtype)
        mean = _combine(step.mean, x, output)
        noise = self._noise(index, mean, model_output, generator)
        self._state = mean if noise is None else torch.add(mean, noise, alpha=step.deviation)
        if self.config.inverse:
            self._found.append(torch.zeros_like(mean) if noise is None else noise)
            self._passed.append(self._state)
        previous = self._hand_out(sample)
        if last and self._edited is not None and self._edited:
            self._refuse()
        if not return_dict:
            return (previous,)
        return EditFriendlyDDPMSchedulerOutput(previous, _combine(step.clean, x, output).to(sample.dtype))

    def _locate(self, timestep: Any) -> int:
        """Index of a step in the schedule, read from the device only if nothing else tells."""
        index = entry_of(timestep, self.timesteps)
        if index is None and (not isinstance(timestep, Tensor) or timestep.device.type == "cpu"):
            index = self._times.index(int(timestep)) if int(timestep) in self._times else None
        if index is None:
            index = self.begin_index if self.step_index is None else self.step_index
        if index is None or index >= len(self._times):
            distances = [abs(time - float(timestep)) for time in self._times]
            index = distances.index(min(distances))
        return index

    def _begin(self, index: int, sample: Tensor) -> None:
        """Forget the last run and set the state at which this one begins."""
        self._forget_run()
        given = sample.to(state_dtype(sample.device), copy=True)
        if self.config.inverse:
            self._run_states = self._states()[index:].to(given)  # (steps, B, C, H, W)
            self._run_start = index
            self._state = self._run_states[0]
            self._expect(sample)
            self._state = given  # what the network saw: so `initial` loses nothing in the dtype of the samples
            self._passed.append(given)
        elif self._maps is None:
            self._state = given
        else:
            self._state = self._first_state(index, given, sample)

    def _first_state(self, index: int, given: Tensor, sample: Tensor) -> Tensor:
        """The state at which a run with noise maps begins, once they are known to fit it."""
        assert self._maps is not None
        initial, noises, times = self._maps
        steps = len(self._times) - index
        if steps > len(noises):
            raise ValueError(f"A run of {steps} steps needs as many noise maps, got {len(noises)}: take fewer steps.")
        if times is not None and times[-steps:] != self._times[index:]:
            raise ValueError(
                f"The noise maps belong to the times {times[-steps:]}, got a run at {self._times[index:]}: call"
                " `set_timesteps` as for the inversion."
            )
        if initial.shape != sample.shape:
            raise ValueError(
                f"The noise maps are for samples of the shape {tuple(initial.shape)}, got {tuple(sample.shape)}."
            )
        self._run_maps = noises[-steps:].to(given)
        self._run_start = index
        if steps < len(noises):
            return given
        self._state = initial.to(given)
        self._expect(sample)
        return self._state

    def _continue(self, sample: Tensor) -> None:
        """Take up the state behind a sample; one that was changed replaces it, or is refused by an inversion."""
        assert self._state is not None
        if sample is self._returned and self._version is not None and sample._version == self._version:
            return  # the very tensor, not written to since: nothing to compare
        if self.config.inverse:
            self._expect(sample)
        else:
            same = sample == self._state.to(sample.dtype)
            self._state = torch.where(same, self._state, sample.to(self._state.dtype))

    def _expect(self, sample: Tensor) -> None:
        """Raise an error if a sample is not the state rounded: at the run's end where reading that would stall."""
        assert self._state is not None
        if sample.shape != self._state.shape:
            self._refuse()
        edited = (sample != self._state.to(sample.dtype)).any()
        if edited.device.type != "cpu":
            self._edited = edited if self._edited is None else self._edited | edited
        elif edited:
            self._refuse()

    def _refuse(self) -> None:
        self._forget_run()
        if not self.config.inverse:
            raise ValueError(
                "The latents given are not those of the noise maps: hand the pipeline what `set_noises` returned, in"
                " the dtype of its model."
            )
        raise ValueError(
            "The latents given are not the noised source: hand the pipeline what `initial_latents` returned for the"
            " same times, in the dtype of its model, and change nothing between its steps."
        )

    def _noise(self, index: int, mean: Tensor, output: Tensor, generator: Generators) -> Tensor | None:
        """The noise of a step: found, stored or drawn; None where there is none."""
        deviation, number = self._steps[index].deviation, 0
        last = index + 1 == len(self._steps)
        if self.config.inverse:
            if last or deviation == 0:
                return None
            number = index + 1 - self._run_start
            return (self._run_states[number] - mean) / deviation
        if deviation == 0:
            return None
        if self._maps is not None:
            return self._run_maps[index - self._run_start]
        return randn_tensor(mean.shape, generator=generator, device=output.device, dtype=output.dtype).to(mean)

    def _hand_out(self, sample: Tensor) -> Tensor:
        """A copy of the state in the dtype of the samples, remembered."""
        assert self._state is not None
        returned = self._state.to(sample.dtype, copy=True)
        self._given, self._returned = sample, returned
        self._version = None if returned.is_inference() else returned._version
        return returned

    # The rest of diffusers' interface

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample as it is: variance-preserving models take it unscaled."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noised samples sqrt(A) x0 + sqrt(1 - A) noise: `(batch, ...)` tensors, times `(batch,)` or `(1,)`."""
        signal, deviation = self._roots_at(timesteps, original_samples)
        return signal * original_samples + deviation * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Target of v-prediction, sqrt(A) noise - sqrt(1 - A) x0, for training; arguments as in `add_noise`."""
        signal, deviation = self._roots_at(timesteps, sample)
        return signal * noise - deviation * sample

    def _roots_at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        times = timesteps.reshape(-1).to(like.device)
        alpha = self.alphas_cumprod.to(like.device, state_dtype(like.device))[times.long()]
        alpha = alpha.view(-1, *[1] * (like.ndim - 1))
        return alpha.sqrt().to(like.dtype), (1 - alpha).sqrt().to(like.dtype)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _step(now: Level, target: Level, eta: float) -> _Step:
    """Coefficients of a step of DDPM between two levels; A = signal^2, 1 - A = noise^2."""
    # noise is above 0 at every time of a schedule of betas, signal at every one but perhaps the first
    added = 1 - (now.signal / target.signal) ** 2
    variance = max((eta * target.noise / now.noise) ** 2 * added, 0.0)
    direction = max(target.noise**2 - variance, 0.0) ** 0.5
    return _Step(now.to(replace(target, noise=direction)), now.clean, variance**0.5)


def _combine(coefficients: Sequence[float], x: Tensor, output: Tensor) -> Tensor:
    return torch.add(coefficients[0] * x, output, alpha=coefficients[1])
