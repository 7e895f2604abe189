"""ResShift sampler: restoration in 4 to 15 steps by a chain that shifts the residual between two pictures.

Yue, Wang, Loy, "ResShift: Efficient Diffusion Model for Image Super-resolution by Residual Shifting", NeurIPS 2023,
arXiv 2307.12348, and "Efficient Diffusion Model for Image Restoration by Residual Shifting", TPAMI 2024,
arXiv 2403.07319. With x0 the clean picture, y the degraded one at the same size (encoded, for latent models), k =
`kappa`, m = `min_noise_level`, E = `etas_end`, p = `power`, and times i = 0 ... T - 1, the last the noisiest:

    s_i = s_0 (E / s_0)^((i / (T - 1))^p),   s_0 = min(m / k, m),   eta_i = s_i^2
    x_i = x0 + eta_i (y - x0) + k s_i noise                                          `add_noise`
    x   = y + k s noise, with s of the first time of the run                         `initial_sample`
    x_j = (eta_j / eta_i) x_i + (a / eta_i) p + k sqrt(eta_j / eta_i a) z            `step`, a = eta_i - eta_j

p is the clean picture that the network's output stands for; after the last time x is p itself. The network is given
x_i / sqrt(k^2 eta_i + 1), or x_i / (3 k s_i + 1) in pixel space, and the time i as it is; the chain is not scaled.

The schedule is the released program's (commit 3ce1d81; written from the equations, not from its code): it sets
sqrt(eta) = 0.99 at the last time, where the paper speaks of eta = 0.999 and caps the first eta at 0.001. Differences
from it: tables and states in float64; no noise is drawn for the last step, where it draws one and drops it; pixel
space works.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from .carried_state import CarriedStateMixin, Generators, noise_like, require_like
from .noise_schedule import check_choices, checked_times, require_output_like, require_steps, state_dtype

__all__ = ["ResShiftScheduler", "ResShiftSchedulerOutput"]

TARGETS = ("sample", "residual", "epsilon", "epsilon_scale")


@dataclass
class ResShiftSchedulerOutput(BaseOutput):
    """Output of [`ResShiftScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` of shape `(batch, channels, height, width)`): The sample to feed to the next step;
            after the last one the restored picture (for latent models, its latents).
        pred_original_sample (`torch.Tensor` of the same shape): The clean sample that the model predicts.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class ResShiftScheduler(CarriedStateMixin, SchedulerMixin, ConfigMixin):
    """Residual shifting between a degraded and a clean picture (ResShift, arXiv 2307.12348 and 2403.07319).

    It fits networks trained with it alone, since no stock scheduler's config tells what it needs:

        scheduler.set_timesteps(15)
        x = scheduler.initial_sample(degraded, noise)     # (B, C, H, W) each, degraded at the size of the result
        for t in scheduler.timesteps:
            x = scheduler.step(model(scheduler.scale_model_input(x, t), t, ...), t, x, degraded).prev_sample

    Args:
        num_train_timesteps (`int`): Length T of the chain, at least 2: 15 or, trained for it, 4.
        min_noise_level (`float`): m, the noise at the first time: 0.04 for 15 steps, 0.2 for 4.
        kappa (`float`): k, strength of the noise.
        power (`float`): p, how late the shift sets in: with smaller values, most of it at the cleaner times.
        etas_end (`float`): E, the last sqrt(eta), in (min(m / k, m), 1). (The field's name; the value is a root.)
        prediction_type (`str`): What the network puts out: the clean `"sample"` (`xstart` in the released program),
            the `"residual"` y - x0, the noise as `"epsilon"`, or, as `"epsilon_scale"`, k s_i times the noise.
        normalize_input (`bool`): Scale what the network is given to about unit variance.
        latent_space (`bool`): The chain runs in an autoencoder's latents (`latent_flag` there): tells how to scale.
        clip_sample (`bool`): Clip predicted clean samples: for pixels, not for latents.
        clip_sample_range (`float`): To plus and minus this value.

    Attributes:
        sqrt_etas, etas (`torch.Tensor` of shape `(T,)`): s and eta, float64 on the CPU.
        step_index, begin_index (`int` or None): Index in `timesteps` of the next step, of the first one.

    Raises:
        ValueError: For a value outside what is listed above.
    """

    _compatibles: list[str] = []
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 15,
        min_noise_level: float = 0.04,
        kappa: float = 2.0,
        power: float = 0.3,
        etas_end: float = 0.99,
        prediction_type: Literal["sample", "residual", "epsilon", "epsilon_scale"] = "sample",
        normalize_input: bool = True,
        latent_space: bool = True,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
    ) -> None:
        check_choices(self.config, prediction_type=TARGETS)
        if not isinstance(num_train_timesteps, int) or num_train_timesteps < 2:
            raise ValueError(f"`num_train_timesteps` must be a whole number from 2 on, got {num_train_timesteps!r}.")
        for name in ("min_noise_level", "kappa", "power", "clip_sample_range"):
            if not 0 < self.config[name] < float("inf"):
                raise ValueError(f"`{name}` must be a number above 0, got {self.config[name]}.")
        first = min(min_noise_level / kappa, min_noise_level)
        if not first < etas_end < 1:
            raise ValueError(
                f"`etas_end` must lie between the first sqrt(eta), {first:g} by `min_noise_level` and `kappa`, and 1,"
                f" got {etas_end}."
            )
        rises = (np.arange(num_train_timesteps) / (num_train_timesteps - 1)) ** power
        self.sqrt_etas = torch.from_numpy(first * (etas_end / first) ** rises)  # (T,), float64 on the CPU
        self.etas = self.sqrt_etas**2
        self._roots = self.sqrt_etas.tolist()
        self._weights = {weighted: self._loss_weights(weighted) for weighted in (False, True)}
        self.num_inference_steps: int | None = None
        self._start(list(range(num_train_timesteps - 1, -1, -1)), "cpu")

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in [`ConfigMixin`], but raises a ValueError for the config of a model that was not trained with this."""
        if isinstance(config, dict) and "kappa" not in config:
            foreign = [key for key in ("beta_start", "shift", "sigma_data", "sigma_min") if key in config]
            if foreign:
                raise ValueError(
                    f"{cls.__name__} needs a network that was trained with residual shifting, got the config of"
                    f" {config.get('_class_name', 'another scheduler')} (it has `{foreign[0]}`): keep the scheduler"
                    " that came with the model."
                )
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    # A run

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | Tensor | None = None,
    ) -> None:
        """Set the times of the next run and forget the last one; call it before every run.

        Fewer steps N than T are respaced as in the released program: the times int(j T / N), j = 0 ... N - 1. These
        hold 0 but never T - 1, so a run starts with less noise than the network was trained to start from
        (`initial_sample` takes that into account): 5 of 15 steps start at sqrt(eta) 0.83 in place of 0.99. To sample
        in 4 steps, train with `num_train_timesteps=4`; or pass `timesteps` that begin with T - 1.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps N, at most T. None: all of them.
            device (`str` or `torch.device`, *optional*): Where `timesteps` lives.
            timesteps (list of ints or tensor of shape `(N,)`, *optional*): The times themselves, strictly falling.

        Raises:
            ValueError: If both are given, or the times do not fit the chain.
        """
        count = self.config.num_train_timesteps
        if timesteps is not None and num_inference_steps is not None:
            raise ValueError("`set_timesteps` takes either `num_inference_steps` or `timesteps`: pass one.")
        if timesteps is not None:
            times = checked_times(torch.as_tensor(timesteps).tolist(), count)
        else:
            steps = count if num_inference_steps is None else num_inference_steps
            require_steps(steps, count)
            times = [int(count / steps * step) for step in range(steps)][::-1]
        self.num_inference_steps = len(times)
        self._start(times, device)

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise at the start of a run, k s: what is added to y."""
        return self.config.kappa * self._roots[self._times[0]]

    def initial_sample(self, degraded: Tensor, noise: Tensor) -> Tensor:
        """Where a run begins: y + k s noise, with s of the first time that `set_timesteps` chose.

        Args:
            degraded (`torch.Tensor` of shape `(batch, channels, height, width)`): y, at the size of the result.
            noise (`torch.Tensor` of the same shape): Standard normal.

        Returns:
            The sample for the first step, of the same shape, in the dtype of `degraded`.

        Raises:
            ValueError: If the shapes differ.
        """
        require_like(degraded, noise=noise)
        return degraded + self.init_noise_sigma * noise.to(degraded)

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """Scale a sample for the network; the chain goes on with the unscaled one.

        Args:
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): The state at `timestep`.
            timestep (`int` or `torch.Tensor`, scalar or of shape `(batch,)`): Its time, in training one a sample.

        Returns:
            x / sqrt(k^2 eta + 1), in pixel space x / (3 k s + 1), or the sample as it is, in its dtype.
        """
        if not self.config.normalize_input:
            return sample
        root = self._at("sqrt_etas", timestep, sample)
        kappa = self.config.kappa
        scale = ((kappa * root) ** 2 + 1).sqrt() if self.config.latent_space else 3 * kappa * root + 1
        return (sample / scale).to(sample.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        degraded: Tensor | None = None,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> ResShiftSchedulerOutput | tuple[Tensor, ...]:
        """Take the sample from `timestep` to the next time of the schedule.

        Args:
            model_output (`torch.Tensor` of shape `(batch, channels, height, width)`): The prediction.
            timestep (`int` or scalar `torch.Tensor`): The time that the model was given.
            sample (`torch.Tensor` of the same shape): The state at `timestep`, not scaled. Values that the last step
                returned are taken up unrounded; others as they are.
            degraded (`torch.Tensor` of the same shape, *optional*): y; not needed where the network predicts x0.
            generator (`torch.Generator` or list of `batch` of them, *optional*): Source of the noise z.
            variance_noise (`torch.Tensor` of the same shape, *optional*): z itself.
            return_dict (`bool`): Return a [`ResShiftSchedulerOutput`] rather than a tuple.

        Returns:
            [`ResShiftSchedulerOutput`], or the tuple of its fields; in `sample.dtype`.

        Raises:
            ValueError: Before `set_timesteps`, for shapes that differ, for a time outside the chain, for two sources
                of noise, or without `degraded` where the prediction needs it.
        """
        require_output_like(model_output, sample)
        require_like(sample, degraded=degraded, variance_noise=variance_noise)
        if generator is not None and variance_noise is not None:
            raise ValueError("`step` takes either `generator` or `variance_noise`, got both: pass one.")
        self._require_degraded(degraded)
        time, after = self._enter(timestep)
        x = self._unrounded(sample)
        root = self._roots[time]
        eta = root**2
        clean = self._clean(model_output.to(x), x, degraded, eta, root)
        state = clean
        if after >= 0:
            kept = self._roots[after] ** 2 / eta  # eta_j / eta_i
            noise = noise_like(model_output, generator, variance_noise).to(x)
            deviation = self.config.kappa * (kept * (1 - kept) * eta) ** 0.5
            state = kept * x + (1 - kept) * clean + deviation * noise
        output = self._hand_out(state, sample, keep=after >= 0), clean.to(sample.dtype)
        return ResShiftSchedulerOutput(*output) if return_dict else output

    def _clean(self, output: Tensor, x: Tensor, degraded: Tensor | None, eta: Any, root: Any) -> Tensor:
        """The clean sample that an output stands for; eta and its root are numbers or broadcast over the batch."""
        if self.config.prediction_type == "sample":
            clean = output
        else:
            assert degraded is not None
            y = degraded.to(x)
            if self.config.prediction_type == "residual":
                clean = y - output
            else:
                noise = output if self.config.prediction_type == "epsilon_scale" else self.config.kappa * root * output
                clean = (x - noise - eta * y) / (1 - eta)
        limit = self.config.clip_sample_range
        return clean.clamp(-limit, limit) if self.config.clip_sample else clean

    def _require_degraded(self, degraded: Tensor | None) -> None:
        kind = self.config.prediction_type
        if degraded is None and kind != "sample":
            raise ValueError(f'A prediction of type "{kind}" is relative to the degraded picture: pass `degraded`.')

    # Training

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor, degraded: Tensor) -> Tensor:
        """The chain's state at given times, x0 + eta (y - x0) + k s noise.

        Args:
            original_samples (`torch.Tensor` of shape `(batch, channels, height, width)`): x0.
            noise (`torch.Tensor` of the same shape): Standard normal.
            timesteps (`torch.Tensor` of shape `(batch,)` or `(1,)`): Times in [0, T - 1].
            degraded (`torch.Tensor` of the same shape as x0): y.

        Returns:
            x at these times, of the same shape, in the dtype of `original_samples`.

        Raises:
            ValueError: If the shapes differ, or a time lies outside the chain.
        """
        self._check_training(original_samples, timesteps, noise=noise, degraded=degraded)
        dtype = original_samples.dtype
        eta = self._at("etas", timesteps, original_samples).to(dtype)
        sigma = (self.config.kappa * self._at("sqrt_etas", timesteps, original_samples)).to(dtype)
        return original_samples + eta * (degraded - original_samples) + sigma * noise

    def training_target(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor, degraded: Tensor) -> Tensor:
        """What the network must put out for the state that `add_noise` makes of the same arguments.

        Returns:
            x0, y - x0, the noise, or k s times the noise, as `prediction_type` says; in the dtype of x0.

        Raises:
            ValueError: If the shapes differ, or a time lies outside the chain.
        """
        self._check_training(original_samples, timesteps, noise=noise, degraded=degraded)
        kind = self.config.prediction_type
        if kind == "sample":
            return original_samples
        if kind == "residual":
            return degraded - original_samples
        if kind == "epsilon":
            return noise
        return (self.config.kappa * self._at("sqrt_etas", timesteps, noise)).to(noise.dtype) * noise

    def predict_original(
        self, model_output: Tensor, timesteps: Tensor, sample: Tensor, degraded: Tensor | None = None
    ) -> Tensor:
        """The clean samples that outputs stand for, each at its own time: for losses on the picture, such as LPIPS.

        Args:
            model_output (`torch.Tensor` of shape `(batch, channels, height, width)`): The prediction.
            timesteps (`torch.Tensor` of shape `(batch,)` or `(1,)`): Times in [0, T - 1].
            sample (`torch.Tensor` of the same shape as the prediction): What `add_noise` returned, not scaled.
            degraded (`torch.Tensor` of the same shape, *optional*): y; not needed where the network predicts x0.

        Returns:
            x0 as predicted, clipped if `clip_sample`, in the dtype of `sample`; gradients pass.

        Raises:
            ValueError: If the shapes differ, a time lies outside the chain, or `degraded` is missing.
        """
        require_output_like(model_output, sample)
        self._check_training(sample, timesteps, degraded=degraded)
        self._require_degraded(degraded)
        eta, root = (self._at(table, timesteps, sample) for table in ("etas", "sqrt_etas"))
        x = sample.to(eta.dtype)
        return self._clean(model_output.to(x), x, degraded, eta, root).to(sample.dtype)

    def loss_weights(self, timesteps: Tensor, weighted: bool = False) -> Tensor:
        """Weights of the squared errors, so that the loss is mean(w_i mean((target - output)^2)).

        The released settings are unweighted: 1, but 1 / (k^2 eta) for `"epsilon_scale"`, whose target is that small.

        Args:
            timesteps (`torch.Tensor` of shape `(batch,)`): Times in [0, T - 1].
            weighted (`bool`): Weigh by the variational bound instead, with v the variance of a step of the full chain
                (at time 0 that of time 1): (a / eta)^2 / 2v for x0 and residual, (k a / ((1 - eta) s))^2 / 2v for the
                noise, over k^2 eta for the scaled one.

        Returns:
            `(batch,)`, float64 (float32 where the device has no float64).

        Raises:
            ValueError: If a time lies outside the chain.
        """
        self._check_times(timesteps)
        table = self._weights[weighted].to(state_dtype(timesteps.device)).to(timesteps.device)
        return table.index_select(0, timesteps.reshape(-1).long())

    def _loss_weights(self, weighted: bool) -> Tensor:
        """The table of `loss_weights`, `(T,)`."""
        kind, kappa, eta = self.config.prediction_type, self.config.kappa, self.etas
        weights = torch.ones_like(eta)
        if weighted:
            before = torch.cat([eta.new_zeros(1), eta[:-1]])
            shift = eta - before  # a
            variance = kappa**2 * before / eta * shift
            variance[0] = variance[1]
            share = shift / eta if kind in ("sample", "residual") else kappa * shift / ((1 - eta) * self.sqrt_etas)
            weights = share**2 / (2 * variance)
        return weights / (kappa**2 * eta) if kind == "epsilon_scale" else weights
