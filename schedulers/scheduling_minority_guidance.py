"""Minority guidance: DDPM and DDIM steered by a gradient towards samples that the data has few of, and Boost-and-Skip.

Um, Lee, Ye, "Don't Play Favorites: Minority Guidance for Diffusion Models", ICLR 2024, arXiv 2301.12334. With A, A' =
`alphas_cumprod` at time t and at its cleaner neighbour, b = 1 - A / A', and p, e the clean sample (clipped) and the
noise that belongs to it, a gradient g at x_t steers a step by

    x_t' = sqrt(A') b / (1 - A) p + sqrt(A / A') (1 - A') / (1 - A) x_t + v s g + sqrt(v) z          ancestral
    e_g  = e - sqrt(1 - A) s g,   x_t' = sqrt(A') p_g + sqrt(1 - A' - w^2) e_g + w z                 DDIM

with p_g the clean sample that belongs to e_g, w^2 = eta^2 (1 - A') / (1 - A) b, and v the variance of the ancestral
step (`variance_type`). For a classifier of noisy samples, whose class y is a bin of the minority score, g is the
gradient of log p(y | x_t, t). Self-guidance (Um, Ye, ECCV 2024, arXiv 2407.11555) takes another g, through the
denoiser: [`MinorityGuidancePipeline`] gives it to the scheduler by `set_guide`.

Boost-and-Skip (Um, Ye et al., ICML 2025, arXiv 2502.06516) needs no gradient: a run begins with noise of `boost` times
the usual deviation, `skip_steps` steps late, and samples as ever; the noise of an ancestral run takes it back to the
data, at their rare samples.

Differences from the released programs (commits e7e69bd, f239b66, d4d1390; written from the equations, not from their
code): neighbours come from the list of times, whatever its spacing (theirs is `"linspace"`); self-guidance works with
DDIM too, where theirs leaves it out; states and tables in float64.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from .carried_state import CarriedStateMixin, Generators, noise_like, require_like
from .noise_schedule import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    SPACINGS,
    check_choices,
    checked_times,
    noise_schedule,
    require_betas,
    require_fraction,
    require_output_like,
    settings_for,
    spaced_times,
    split_prediction,
    state_dtype,
)

__all__ = ["MinorityGuidanceScheduler", "MinorityGuidanceSchedulerOutput"]

SAMPLERS = ("ancestral", "ddim")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
Classifier = Callable[[Tensor, Tensor], Tensor]
Guide = Callable[[Tensor, int], Tensor | None]
Labels = int | Sequence[int] | Tensor | None


@dataclass
class MinorityGuidanceSchedulerOutput(BaseOutput):
    """Output of [`MinorityGuidanceScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` of shape `(batch, channels, height, width)`): The sample to feed to the next step.
        pred_original_sample (`torch.Tensor` of the same shape): The clean sample that the model predicts, unguided.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class MinorityGuidanceScheduler(CarriedStateMixin, SchedulerMixin, ConfigMixin):
    """Ancestral sampling and DDIM with minority guidance (arXiv 2301.12334), and Boost-and-Skip (arXiv 2502.06516).

    With a classifier of noisy samples in a stock pipeline, for the rarest of its classes:

        pipe.scheduler = MinorityGuidanceScheduler.from_config(pipe.scheduler.config, guidance_scale=3.5)
        pipe.scheduler.set_classifier(classifier)
        pipe(...)

    and Boost-and-Skip, without one:

        pipe.scheduler = MinorityGuidanceScheduler.from_config(
            pipe.scheduler.config, guidance_scale=0.0, boost=2.5, skip_steps=3
        )

    Args:
        num_train_timesteps (`int`): Length T of the training schedule.
        beta_start, beta_end, beta_schedule, trained_betas: The betas, as in stock schedulers.
        set_alpha_to_one (`bool`): The last step goes to A = 1 (clean data); otherwise to A[0].
        steps_offset (`int`): Added to every time of the `"leading"` grid (Stable Diffusion: 1).
        prediction_type (`str`): `"epsilon"`, `"sample"` or `"v_prediction"`.
        clip_sample (`bool`): Clip the predicted clean samples, to plus and minus `clip_sample_range`.
        clip_sample_range (`float`): See there.
        timestep_spacing (`str`): `"leading"`, `"linspace"` (the released programs') or `"trailing"`.
        rescale_betas_zero_snr (`bool`): Rescale the betas to A[T - 1] = 0 (arXiv 2305.08891).
        sampler (`str`): `"ancestral"` or `"ddim"`.
        variance_type (`str`): Of ancestral steps: `"fixed_small"`, `"fixed_large"`, or `"learned_range"` for models
            that put out their variance as further channels (arXiv 2102.09672).
        guidance_scale (`float`): s; 0 is no guidance.
        scale_by_variance (`bool`): Whether ancestral steps multiply the gradient by v; otherwise by 1.
        boost (`float`): Deviation of the noise that a run begins with; above 1 for rare samples
            (`init_noise_sigma`, by which pipelines multiply it).
        skip_steps (`int`): Leave out so many of the noisiest steps.

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
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        timestep_spacing: Literal["leading", "linspace", "trailing"] = "leading",
        rescale_betas_zero_snr: bool = False,
        sampler: Literal["ancestral", "ddim"] = "ancestral",
        variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small",
        guidance_scale: float = 3.5,
        scale_by_variance: bool = True,
        boost: float = 1.0,
        skip_steps: int = 0,
    ) -> None:
        check_choices(
            self.config, beta_schedule=BETA_SCHEDULES, prediction_type=PREDICTION_TYPES, timestep_spacing=SPACINGS,
            sampler=SAMPLERS, variance_type=VARIANCES,
        )  # fmt: skip
        if not math.isfinite(guidance_scale) or guidance_scale < 0:
            raise ValueError(f"`guidance_scale` must be 0 or more, got {guidance_scale}.")
        if not math.isfinite(boost) or boost <= 0:
            raise ValueError(f"`boost` must be above 0, got {boost}.")
        if skip_steps < 0:
            raise ValueError(f"`skip_steps` must be 0 or more, got {skip_steps}.")
        self.betas, self.alphas_cumprod = noise_schedule(self.config)  # (T,) each, float64 on the CPU
        self._host = self.alphas_cumprod.tolist()
        self.init_noise_sigma = float(boost)
        self.num_inference_steps: int | None = None
        self._guide: Guide | None = None
        self._start(list(range(num_train_timesteps - 1, -1, -1)), "cpu")

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in [`ConfigMixin`]; `clip_sample` is off, if the other scheduler has no such setting: it clips nothing.

        Raises:
            ValueError: For a flow-matching or EDM config: no betas, no DDPM.
        """
        config = settings_for(cls, config)
        require_betas(cls, config)
        if isinstance(config, Mapping) and config.get("variance_type", "") is None:  # of solvers that have none
            config = {key: value for key, value in config.items() if key != "variance_type"}
        if isinstance(config, Mapping) and "beta_start" in config:
            config = {"clip_sample": False, **config}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    # What a run works with

    def set_classifier(self, classifier: Classifier | None, labels: Labels = None) -> None:
        """Give the classifier whose gradient guides, and the classes to guide to; they hold until they are replaced.

        Args:
            classifier (callable, or None for none): Takes samples `(batch, channels, height, width)` as the denoiser
                does and times `(batch,)`, and gives logits `(batch, classes)`; differentiable.
            labels (`int`, or one for each sample, *optional*): The classes. None is the last one: of a classifier of
                the minority score, the rarest samples.

        Raises:
            ValueError: If a label is no whole number from 0.
        """
        self._guide = None
        asked = checked_labels(labels)
        if classifier is not None:
            self._guide = lambda sample, time: class_gradient(classifier, sample, time, asked)

    @property
    def guide(self) -> Guide | None:
        """What guides: a classifier's gradient, or what `set_guide` was given."""
        return self._guide

    def set_guide(self, guide: Guide | None) -> None:
        """Give what guides in the place of a classifier; it holds until it is replaced.

        Args:
            guide (callable, or None for none): Takes the samples of a step, `(batch, channels, height, width)`, and
                their time, and gives g of their shape, or None where this step is not to be guided. It is called
                without gradients, after the noise of the step was drawn.
        """
        self._guide = guide

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Set the times of the next run and forget the last one; call it before every run, as pipelines do.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps N, of which `skip_steps` are left out.
            device (`str` or `torch.device`, *optional*): Where `timesteps` lives.
            timesteps (list or tensor of shape `(N,)`, *optional*): The times themselves, strictly falling.

        Raises:
            ValueError: If not exactly one of steps and times is given, the times do not fit the training schedule,
                `skip_steps` leaves none, or the first time has no signal and the model predicts epsilon.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("`set_timesteps` takes either `num_inference_steps` or `timesteps`: pass exactly one.")
        if timesteps is None:
            given: Sequence[float] = spaced_times(self.config, num_inference_steps or 0)
        else:
            given = torch.as_tensor(timesteps).tolist()
        times = checked_times(given, self.config.num_train_timesteps)
        if self.config.skip_steps >= len(times):
            raise ValueError(
                f"`skip_steps` must leave one of the {len(times)} steps at least, got {self.config.skip_steps}."
            )
        times = times[self.config.skip_steps :]
        if self.config.prediction_type == "epsilon" and self._host[times[0]] == 0:
            raise ValueError(
                "A predicted noise says nothing where no signal is left (A = 0): start at a lower time, for instance"
                " with `skip_steps`."
            )
        self.num_inference_steps = len(times)
        self._start(times, device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample as it is: these models take it unscaled.

        Raises:
            ValueError: If nothing guides though `guidance_scale` is above 0: pipelines learn it before the first step.
        """
        self._require_guide()
        return sample

    def earlier_time(self, ratio: float) -> int:
        """Time of the run that so much of its steps, counted from the clean end, lies at or below.

        Args:
            ratio (`float`): In [0, 1]: 0 is the last time of the run, 1 the first.

        Raises:
            ValueError: Before `set_timesteps`.
        """
        if self.num_inference_steps is None:
            raise ValueError("Call `set_timesteps` first: the times of the run are not known yet.")
        return self._times[::-1][min(int(ratio * len(self._times)), len(self._times) - 1)]

    def predict_original(self, model_output: Tensor, timestep: int, sample: Tensor) -> Tensor:
        """Give the clean sample that a prediction stands for, not clipped, of the sample's shape and dtype.

        Args:
            model_output (`torch.Tensor` of shape `(batch, channels, height, width)`): As for `step`.
            timestep (`int`): The time that the model was given.
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): The state at that time.
        """
        output, _ = self._split_output(model_output, sample)
        alpha = torch.tensor(self._host[timestep], dtype=sample.dtype, device=sample.device)
        return split_prediction(self.config.prediction_type, output.to(sample.dtype), sample, alpha)[0]

    # A step

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = True,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> MinorityGuidanceSchedulerOutput | tuple[Tensor, ...]:
        """Take the sample from `timestep` to the next time of the schedule, towards where it is guided.

        Args:
            model_output (`torch.Tensor` of shape `(batch, channels, height, width)`): The model's prediction; with
                `variance_type="learned_range"` of twice the channels.
            timestep (`int` or scalar `torch.Tensor`): The time that the model was given.
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): The state at `timestep`. Values that
                the last step returned are taken up unrounded; others as they are.
            eta (`float`): Of DDIM: part of the noise that is drawn anew, in [0, 1]. Ancestral steps draw all of it.
            use_clipped_model_output (`bool`): Without effect: the noise belongs to the clipped sample always.
            generator (`torch.Generator` or list of `batch` of them, *optional*): Source of the noise z.
            variance_noise (`torch.Tensor` of the same shape, *optional*): z itself.
            return_dict (`bool`): Return a [`MinorityGuidanceSchedulerOutput`] rather than a tuple.

        Returns:
            [`MinorityGuidanceSchedulerOutput`], or the tuple of its fields; in `sample.dtype`.

        Raises:
            ValueError: Before `set_timesteps`, for shapes that differ, for a time outside the training schedule, for
                `eta` outside [0, 1], for two sources of noise, if nothing guides though `guidance_scale` is above 0,
                or if a label is none of the classifier's.
        """
        require_like(sample, variance_noise=variance_noise)
        require_fraction("eta", eta)
        if generator is not None and variance_noise is not None:
            raise ValueError("`step` takes either `generator` or `variance_noise`, got both: pass one.")
        output, spread = self._split_output(model_output, sample)
        time, after = self._enter(timestep)
        x = self._unrounded(sample)
        now, then = self._host[time], self._alpha_after(after)
        clean, eps = split_prediction(self.config.prediction_type, output.to(x), x, x.new_tensor(now))
        predicted = clean
        if self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
            eps = (x - math.sqrt(now) * clean) / math.sqrt(1 - now)
        ancestral = self.config.sampler == "ancestral"
        noisy = after >= 0 and (ancestral or eta > 0)
        noise = noise_like(output, generator, variance_noise).to(x) if noisy else None
        gradient = self._gradient(sample, time)
        if ancestral:
            variance = self._variance(time, after, spread)
            state = _posterior_mean(x, clean, now, then)
            if gradient is not None:
                state = state + (variance if self.config.scale_by_variance else 1.0) * gradient
        else:
            state, variance = _ddim(x, clean, eps, (now, then), eta, gradient)
        if noise is not None:
            state = state + variance**0.5 * noise
        previous = self._hand_out(state, sample, keep=after >= 0)
        if not return_dict:
            return previous, predicted.to(sample.dtype)
        return MinorityGuidanceSchedulerOutput(previous, predicted.to(sample.dtype))

    def _split_output(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction, and of a model that learned its variance where that lies between the two fixed ones."""
        if self.config.variance_type != "learned_range":
            require_output_like(model_output, sample)
            return model_output, None
        shape = (len(sample), 2 * sample.shape[1], *sample.shape[2:])
        if model_output.shape != shape:
            raise ValueError(
                f"`variance_type='learned_range'` needs a prediction of the shape {shape}, of twice the channels, got"
                f" {tuple(model_output.shape)}: of a model without a learned variance, set `variance_type`."
            )
        output, spread = model_output.chunk(2, dim=1)
        return output, spread

    def _alpha_after(self, after: int) -> float:
        """A' of a time of the run, or of its end (-1)."""
        if after >= 0:
            return self._host[after]
        return 1.0 if self.config.set_alpha_to_one else self._host[0]

    def _variance(self, time: int, after: int, spread: Tensor | None) -> Any:
        """Variance of an ancestral step: a number, or a tensor where the model has learned it."""
        now, then = self._host[time], self._alpha_after(after)
        large = 1 - now / then
        small = large * (1 - then) / (1 - now)
        if spread is None and self.config.variance_type == "fixed_small":
            return small
        if after < 0 and then == 1 and len(self._times) > 1:  # logarithms and deviations need more than 0
            before = self._host[self._times[-2]]
            small = (1 - before / now) * (1 - now) / (1 - before)
        if spread is None:
            return small if after < 0 else large
        part = spread.to(state_dtype(spread.device)) / 2 + 0.5
        return (part * math.log(max(large, 1e-20)) + (1 - part) * math.log(max(small, 1e-20))).exp()

    def _gradient(self, sample: Tensor, time: int) -> Tensor | None:
        """What a step is steered by, s g, in the dtype of states; None if nothing guides."""
        scale, guide = self.config.guidance_scale, self._require_guide()
        gradient = None if guide is None else guide(sample, time)
        if gradient is None:
            return None
        require_like(sample, gradient=gradient)
        return scale * gradient.to(state_dtype(sample.device))

    def _require_guide(self) -> Guide | None:
        """What guides, or None without guidance; a ValueError if it is missing."""
        scale = self.config.guidance_scale
        if scale == 0:
            return None
        if self._guide is None:
            raise ValueError(
                f"`guidance_scale` is {scale}, but there is no classifier: call `set_classifier`, use"
                " MinorityGuidancePipeline, or set `guidance_scale=0` (Boost-and-Skip needs no classifier)."
            )
        return self._guide

    # Training

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise clean samples to given times, as stock schedulers do.

        Args:
            original_samples (`torch.Tensor` of shape `(batch, channels, height, width)`): x0.
            noise (`torch.Tensor` of the same shape): Standard normal.
            timesteps (`torch.Tensor` of shape `(batch,)` or `(1,)`): Times in [0, T - 1].
        """
        self._check_training(original_samples, timesteps, noise=noise)
        alpha = self._at("alphas_cumprod", timesteps, original_samples)
        dtype = original_samples.dtype
        return alpha.sqrt().to(dtype) * original_samples + (1 - alpha).sqrt().to(dtype) * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of a model that predicts v, as in stock; arguments as for `add_noise`."""
        self._check_training(sample, timesteps, noise=noise)
        alpha = self._at("alphas_cumprod", timesteps, sample)
        return alpha.sqrt().to(sample.dtype) * noise - (1 - alpha).sqrt().to(sample.dtype) * sample


def class_gradient(classifier: Classifier, sample: Tensor, time: int, labels: Labels) -> Tensor:
    """Gradient of log p(y | x_t, t) at x_t.

    Args:
        classifier: See `MinorityGuidanceScheduler.set_classifier`.
        sample (`torch.Tensor` of shape `(batch, channels, height, width)`): x_t.
        time: t.
        labels: y; None is the last class.

    Returns:
        The gradient, of the sample's shape.

    Raises:
        ValueError: If the logits have another shape, a label is none of the classes, or there are not as many labels
            as samples.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = sample.detach().clone().requires_grad_()
        logits = classifier(x, torch.full((len(x),), time, device=x.device))
        if logits.ndim != 2 or len(logits) != len(x):
            raise ValueError(f"The classifier must give logits ({len(x)}, classes), got {tuple(logits.shape)}.")
        classes, asked = logits.shape[1], checked_labels(labels)
        asked = torch.tensor([classes - 1]) if asked is None else asked
        if len(asked) not in (1, len(x)):
            raise ValueError(f"`labels` must be one, or one for each of {len(x)} samples, got {len(asked)}.")
        if int(asked.max()) >= classes:
            raise ValueError(f"`labels` must lie in [0, {classes - 1}], got {asked.tolist()}.")
        asked = asked.to(x.device, non_blocking=True)
        chosen = logits.log_softmax(dim=1).gather(1, asked.expand(len(x)).unsqueeze(1))
        return torch.autograd.grad(chosen.sum(), x)[0]


def checked_labels(labels: Labels) -> Tensor | None:
    """Give classes as whole numbers `(n,)` on the CPU, where they can be looked at without waiting; None is None.

    Raises:
        ValueError: If there are none, or one is no whole number from 0.
    """
    if labels is None:
        return None
    try:
        asked = torch.as_tensor(labels).reshape(-1).cpu()
    except (TypeError, ValueError, RuntimeError):
        asked = torch.empty(0)
    if not len(asked) or asked.is_floating_point() or asked.is_complex() or int(asked.min()) < 0:
        raise ValueError(f"`labels` must be whole numbers from 0, one or one for each sample, got {labels!r}.")
    return asked.long()


def _posterior_mean(x: Tensor, clean: Tensor, now: float, then: float) -> Tensor:
    """Mean of x_t' given x_t and the clean sample."""
    beta = 1 - now / then
    return (math.sqrt(then) * beta * clean + math.sqrt(now / then) * (1 - then) * x) / (1 - now)


def _ddim(
    x: Tensor, clean: Tensor, eps: Tensor, alphas: tuple[float, float], eta: float, gradient: Tensor | None
) -> tuple[Tensor, float]:
    """x_t' of DDIM without its noise, and the variance of that."""
    now, then = alphas
    if gradient is not None and now > 0:  # where no signal is left, there is nothing yet to steer
        eps = eps - math.sqrt(1 - now) * gradient
        clean = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
    variance = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
    return math.sqrt(then) * clean + math.sqrt(max(1 - then - variance, 0.0)) * eps, variance
