"""DDCM sampler: text-guided editing of a real picture without inverting it.

Xu, Huang, Pan, Ma, Chai, "Inversion-Free Image Editing with Natural Language", CVPR 2024, arXiv 2312.04965. The source
picture is known, so what the network gets wrong about it at any time is known too, and is taken off the prediction for
the edited one. With A = `alphas_cumprod` at the time t, A' at the next time, z0 the source, x_b the state of branch b
(source s, target t and, where attention control needs it, mutual m), e_b the noise predicted for it, and z one noise
that all branches share:

    e_c = (x_s - sqrt(A) z0) / sqrt(1 - A)            the noise with which the source would decode to z0
    k_b = e_b - e_s + e_c                             its corrected prediction;  k_s = k_m (two branches: e_c)
    p_b = (x_b - sqrt(1 - A) k_b) / sqrt(A)           the clean sample of a branch;  p_s = z0
    x_b <- sqrt(A') p_b + sqrt((1 - A') (1 - eta)) k_b + sqrt(eta (1 - A')) z,  after the last time x_b <- p_b.

Put D_b for the clean sample that the network's own output stands for: then p_b = z0 + (D_b - D_s), which is how it is
computed here. It holds for epsilon, v and sample predictions alike, and is z0 to the bit where both branches agree.

Differences from the released program (commit eaac91e; written from the equations, not from its code): any batch, other
predictions than epsilon, two branches, other grids than LCM's, states in float64, no noise drawn for the last step.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

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
    split_prediction,
    state_dtype,
)


@dataclass
class DDCMSchedulerOutput(BaseOutput):
    """Output of [`DDCMScheduler.step`], source, target and mutual branch one after the other along the batch.

    Args:
        prev_sample (`torch.Tensor` of shape `(branches * batch, channels, height, width)`): The states to feed to the
            next step; after the last one the clean samples.
        pred_original_sample (`torch.Tensor` of the same shape): The clean samples p; the source's are z0.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class DDCMScheduler(SchedulerMixin, ConfigMixin):
    """Virtual inversion (denoising diffusion consistent model) of InfEdit, arXiv 2312.04965.

    The batch holds the branches one after the other: `[source * B, target * B]` or `[source * B, target * B, mutual *
    B]`, all started from the same state. Tell the source pictures first:

        scheduler.set_source(z0)                      # (B, C, H, W)
        scheduler.set_timesteps(15, strength=1.0)
        x = noise.repeat(2, 1, 1, 1)                  # or add_noise(z0, noise, timesteps[:1]) where strength < 1
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t, [source_prompt, target_prompt]), t, x).prev_sample

    A stock pipeline may run that loop: with a source set, `pipe([source, target], latents=..., eta=1.0)` edits.

    Args:
        num_train_timesteps (`int`): Length T of the training schedule.
        beta_start, beta_end (`float`): First and last beta.
        beta_schedule (`str`): `"linear"`, `"scaled_linear"` (linear in sqrt(beta)) or `"squaredcos_cap_v2"` (cosine).
        trained_betas (array or list of floats, *optional*): The betas themselves, in place of the three above.
        original_inference_steps (`int`, *optional*): Times are chosen as [`LCMScheduler`] does, out of a grid of so
            many that ends with T - 1: the paper's setting. None: as `timestep_spacing` says. The LCM grid comes first
            because configs of other schedulers bring a spacing along, and the method wants to start at pure noise.
        timestep_spacing (`str`): `"leading"`, `"linspace"` or `"trailing"`, as in stock schedulers.
        steps_offset (`int`): Added to every time of the `"leading"` grid (Stable Diffusion: 1).
        prediction_type (`str`): `"epsilon"`, `"sample"` or `"v_prediction"`.
        rescale_betas_zero_snr (`bool`): Rescale the betas to A[T - 1] = 0 (arXiv 2305.08891).

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
        original_inference_steps: int | None = 50,
        timestep_spacing: Literal["leading", "linspace", "trailing"] = "leading",
        steps_offset: int = 0,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        check_choices(
            self.config,
            beta_schedule=BETA_SCHEDULES,
            prediction_type=PREDICTION_TYPES,
            timestep_spacing=SPACINGS,
        )
        if original_inference_steps is not None and not 1 <= original_inference_steps <= num_train_timesteps:
            limit = f"[1, {num_train_timesteps}] (`num_train_timesteps`)"
            raise ValueError(
                f"`original_inference_steps` must lie in {limit} or be None, got {original_inference_steps}."
            )
        self.betas, self.alphas_cumprod = noise_schedule(self.config)  # (T,) each, float64 on the CPU
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, device="cpu")
        self._source: Tensor | None = None  # z0, (B, C, H, W)
        self._reset(self.timesteps.tolist(), self.timesteps.device)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in [`ConfigMixin`], but raises a ValueError for a flow-matching config, whose model has no betas."""
        config = settings_for(cls, config)
        require_betas(cls, config)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def set_source(self, original_samples: Tensor | None) -> None:
        """Tell the pictures to edit; they hold until they are replaced, `set_timesteps` keeps them.

        Args:
            original_samples (`torch.Tensor` of shape `(batch, channels, height, width)` or None): z0, clean, in the
                model's units (latents: scaled). None forgets them.
        """
        if original_samples is not None:
            dtype = state_dtype(original_samples.device)
            original_samples = original_samples.detach().to(dtype, copy=True)
        self._source = original_samples
        self._forget()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        original_inference_steps: int | None = None,
        timesteps: list[int] | Tensor | None = None,
        strength: float = 1.0,
    ) -> None:
        """Set the times of the next run and forget the last one; call it before every run, as pipelines do.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps N at strength 1.
            device (`str` or `torch.device`, *optional*): Where `timesteps` lives.
            original_inference_steps (`int`, *optional*): In place of the config's.
            timesteps (list of ints or tensor of shape `(steps,)`, *optional*): The times themselves, strictly falling.
            strength (`float`): Part of the times to keep, in (0, 1]: the first N - int(N * strength) are dropped.

        Raises:
            ValueError: If not exactly one of steps and times is given, the times do not fit the training schedule, no
                step is left, or the first time has no signal and the model predicts epsilon.
        """
        if (timesteps is None) == (num_inference_steps is None):
            raise ValueError("`set_timesteps` takes either `num_inference_steps` or `timesteps`: pass exactly one.")
        original = (
            self.config.original_inference_steps if original_inference_steps is None else original_inference_steps
        )
        if timesteps is not None:
            times = torch.as_tensor(timesteps).tolist()
        elif original is None:
            times = spaced_times(self.config, num_inference_steps or 0)
        else:
            times = self._lcm_times(num_inference_steps or 0, original)
        times = checked_times(times, self.config.num_train_timesteps)
        kept = int(len(times) * strength) if 0 < strength <= 1 else 0
        if kept == 0:
            raise ValueError(
                f"`strength` must lie in (0, 1] and keep one of the {len(times)} steps at least, got {strength}."
            )
        times = times[len(times) - kept :]
        if self.config.prediction_type == "epsilon" and self.alphas_cumprod[times[0]] == 0:
            raise ValueError(
                f"At the time {times[0]} no signal is left (`rescale_betas_zero_snr`), so a predicted epsilon tells"
                " nothing: choose another grid, or lower `strength`."
            )
        self.num_inference_steps = len(times)
        self.timesteps = torch.tensor(times, dtype=torch.int64, device=device)
        self._reset(times, self.timesteps.device)

    def _lcm_times(self, steps: int, original: int) -> list[int]:
        """Times of a run of `steps` steps, falling, evenly out of LCM's grid of `original` times up to T - 1."""
        if not 1 <= original <= self.config.num_train_timesteps:
            limit = f"[1, {self.config.num_train_timesteps}] (`num_train_timesteps`)"
            raise ValueError(f"`original_inference_steps` must lie in {limit}, got {original}.")
        if not 1 <= steps <= original:
            raise ValueError(
                f"`num_inference_steps` must lie in [1, {original}] (`original_inference_steps`), got {steps}: take"
                " fewer steps, or a scheduler with `original_inference_steps=None` and a stock `timestep_spacing`."
            )
        grid = np.arange(original, 0, -1) * (self.config.num_train_timesteps // original) - 1
        return grid[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(np.int64)].tolist()

    def _reset(self, times: list[int], device: torch.device) -> None:
        """Forget the last run: all that `step` remembers is created here."""
        self._nominal = times  # on the host
        self.step_index: int | None = None
        self.begin_index: int | None = None
        self._forget()
        self._alphas = self.alphas_cumprod.cpu().to(state_dtype(device)).to(device)  # (T,)

    def _forget(self) -> None:
        """The next states come from the caller alone."""
        self._master: Tensor | None = None  # the states before they were rounded, (branches * B, C, H, W)
        self._handed: Tensor | None = None  # and after: what the caller was given

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run at this index of `timesteps`; pipelines that start from a noised image call it."""
        self.begin_index = begin_index

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        eta: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        use_clipped_model_output: bool = False,
        return_dict: bool = True,
    ) -> DDCMSchedulerOutput | tuple[Tensor, ...]:
        """Take the states of all branches from `timestep` to the next time of the schedule.

        Args:
            model_output (`torch.Tensor` of shape `(branches * batch, channels, height, width)`): The predictions for
                source, target and (with three branches) mutual, in this order, each for the whole batch.
            timestep (`int` or scalar `torch.Tensor`): The time that the model was given.
            sample (`torch.Tensor` of the same shape): The states at `timestep`. Values that the last step returned are
                taken up unrounded; others (a blend, a callback's edit) as they are.
            eta (`float`): Part of the variance that is drawn anew, in [0, 1]: 1 is DDCM, 0 is deterministic. Stock
                pipelines pass 0 where their caller says nothing.
            generator (`torch.Generator` or list of `batch` of them, *optional*): Source of z.
            variance_noise (`torch.Tensor` of shape `(batch, channels, height, width)`, *optional*): z itself.
            use_clipped_model_output (`bool`): Without effect, for nothing is clipped; taken for pixel pipelines, which
                pass it.
            return_dict (`bool`): Return a [`DDCMSchedulerOutput`] rather than a tuple.

        Returns:
            [`DDCMSchedulerOutput`], or the tuple of its fields; in `sample.dtype`.

        Raises:
            ValueError: Before `set_timesteps` or `set_source`, for a batch that is not two or three times the
                source's, for `eta` outside [0, 1], for two sources of noise, or a noise of the wrong shape.
        """
        source, branches = self._checked(sample, eta, generator, variance_noise)
        require_output_like(model_output, sample)
        index, seen = self._locate(timestep, sample.device)
        alpha = self._alpha_at(seen, sample)  # (1, 1, 1, 1)
        x = self._unrounded(sample)
        clean, eps = split_prediction(self.config.prediction_type, model_output.to(x.dtype), x, alpha)
        source = source.to(device=x.device, dtype=x.dtype)
        repeats = (branches, *[1] * (x.ndim - 1))
        batch = len(source)
        # The differences come first: they are 0 to the bit where a branch agrees with the source.
        clean = (clean - clean[:batch].repeat(repeats)) + source.repeat(repeats)
        prev_sample = clean
        if index + 1 < len(self._nominal):
            consistent = (x[:batch] - alpha.sqrt() * source) / (1 - alpha).sqrt()
            eps = (eps - eps[:batch].repeat(repeats)) + consistent.repeat(repeats)
            if branches == 3:
                eps = torch.cat([eps[2 * batch :], eps[batch:]])
            if eta > 0 and variance_noise is None:
                device, dtype = model_output.device, model_output.dtype
                variance_noise = randn_tensor(source.shape, generator=generator, device=device, dtype=dtype)
            noise = None if variance_noise is None else variance_noise.to(x).repeat(repeats)
            prev_sample = self._renoise(clean, eps, self._alphas[self._nominal[index + 1]], eta, noise)
        rounded = prev_sample.to(sample.dtype)
        self.step_index = index + 1
        self._master, self._handed = prev_sample, rounded.clone()
        if self.step_index == len(self._nominal):
            self._forget()
        output = (rounded, clean.to(sample.dtype))
        return DDCMSchedulerOutput(*output) if return_dict else output

    def _checked(
        self, sample: Tensor, eta: float, generator: Any, variance_noise: Tensor | None
    ) -> tuple[Tensor, int]:
        """The source and the number of branches, once the arguments of `step` are known to make sense."""
        if self.num_inference_steps is None:
            raise ValueError("Call `set_timesteps` before `step`: the times of the run are not known yet.")
        if self._source is None:
            raise ValueError("Call `set_source` before `step`: DDCM edits a picture, which is not known yet.")
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta` must lie in [0, 1] (1: DDCM, 0: deterministic), got {eta}.")
        if generator is not None and variance_noise is not None:
            raise ValueError("`step` takes either `generator` or `variance_noise`, got both: pass one.")
        branches, rest = divmod(len(sample), len(self._source))
        if rest or branches not in (2, 3) or sample.shape[1:] != self._source.shape[1:]:
            raise ValueError(
                "`sample` must hold two or three branches (source, target, mutual) of the source's shape"
                f" {tuple(self._source.shape)}, got {tuple(sample.shape)}."
            )
        if variance_noise is not None and variance_noise.shape != self._source.shape:
            raise ValueError(
                "`variance_noise` is shared by the branches and must have the source's shape"
                f" {tuple(self._source.shape)}, got {tuple(variance_noise.shape)}."
            )
        return self._source, branches

    def _locate(self, timestep: int | float | Tensor, device: torch.device) -> tuple[int, Tensor]:
        """Index of the step, found on the host, and the time that the model saw, `(1,)` on the sample's device.

        A view of `self.timesteps` tells its index by its address and a value at hand by the schedule, whose times are
        all different. Otherwise steps are counted, from `begin_index` or the last time not below the one given.
        """
        index = entry_of(timestep, self.timesteps)
        if index is None and (not isinstance(timestep, Tensor) or timestep.device.type == "cpu"):
            index = self._nominal.index(int(timestep)) if int(timestep) in self._nominal else None
        if index is None:
            index = self.begin_index if self.step_index is None else self.step_index
        if index is None or index >= len(self._nominal):
            index = max(sum(time >= int(timestep) for time in self._nominal) - 1, 0)
        if index != self.step_index:  # not the successor of the last step: a run starts here
            self._forget()
        seen = timestep if isinstance(timestep, Tensor) else torch.full((1,), int(timestep), device=device)
        return index, seen.reshape(-1).to(device, torch.int64)

    def _unrounded(self, sample: Tensor) -> Tensor:
        """The states in the scheduler's precision: as they were before rounding where the caller left them alone.

        A difference of two states is divided by sqrt(A), which is 0.07 at the first time: half precision would show.
        """
        x = sample.to(state_dtype(sample.device))
        if self._master is None or self._handed is None or self._handed.shape != sample.shape:
            return x
        if self._handed.dtype != sample.dtype or self._handed.device != sample.device:
            return x
        return torch.where(sample == self._handed, self._master, x)

    def _renoise(self, clean: Tensor, eps: Tensor, alpha: Tensor, eta: float, noise: Tensor | None) -> Tensor:
        """The states at A = `alpha`: eta weighs variances, so the direction has sqrt(1 - eta), not sqrt(1 - eta^2)."""
        state = alpha.sqrt() * clean + ((1 - alpha) * (1 - eta)).sqrt() * eps
        return state if eta == 0 or noise is None else state + (eta * (1 - alpha)).sqrt() * noise

    def _alpha_at(self, times: Tensor, like: Tensor) -> Tensor:
        """A at the times given, shaped to broadcast over the batch of `like`, on its device."""
        if self._alphas.device != like.device:
            self._alphas = self.alphas_cumprod.cpu().to(state_dtype(like.device)).to(like.device)
        # index_select, because indexing with a scalar tensor reads it back to the host.
        alphas = self._alphas.index_select(0, times.reshape(-1).to(like.device))
        return alphas.reshape(-1, *[1] * (like.ndim - 1))

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return the sample as it is: variance-preserving models take it unscaled."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noised samples sqrt(A) x0 + sqrt(1 - A) noise: `(batch, ...)` tensors, times `(batch,)` or `(1,)`."""
        alpha, dtype = self._alpha_at(timesteps, original_samples), original_samples.dtype
        return alpha.sqrt().to(dtype) * original_samples + (1 - alpha).sqrt().to(dtype) * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Target of v-prediction, sqrt(A) noise - sqrt(1 - A) x0, for training; arguments as in `add_noise`."""
        alpha = self._alpha_at(timesteps, sample)
        return alpha.sqrt().to(sample.dtype) * noise - (1 - alpha).sqrt().to(sample.dtype) * sample

    def __len__(self) -> int:
        return self.config.num_train_timesteps
