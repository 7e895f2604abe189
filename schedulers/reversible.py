"""What the exactly invertible samplers share: the walk along the levels of noise in both directions, and its state.

States are kept in float64, whatever the dtype of the samples: a network in half precision then sees the same input in
both directions. What a scheduler returns is a rounded copy, by which it recognises its state in the next step.
"""

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from .levels import Given, Level, edm_levels, flow_levels, vp_levels
from .noise_schedule import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    SPACINGS,
    STOCK,
    check_choices,
    entry_of,
    noise_schedule,
    process_of,
    require_output_like,
    settings_for,
    state_dtype,
)


@dataclass
class ReversibleSchedulerOutput(BaseOutput):
    """Output of a reversible scheduler's `step`.

    Args:
        prev_sample (`torch.Tensor` of shape `(batch, channels, height, width)`): The sample to feed to the next step.
        pred_original_sample (`torch.Tensor` of the same shape): The clean sample that the model predicts.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class Latent(NamedTuple):
    """A state: its value in float64 and, on the grid of `exact`, `value = whole * spacing + fraction`."""

    value: Tensor
    whole: Tensor | None = None
    fraction: Tensor | None = None


class LatentPair(NamedTuple):
    """Both latents that a run ended with: all that its inverse needs.

    Attributes:
        first: What the network of the opposite run sees first.
        second: Its companion: the state one step before the end (BDIA, O-BELM), or the coupled one (EDICT).
        steps: Number of steps of the run, None if unknown.
    """

    first: Latent
    second: Latent
    steps: int | None = None


class ReversibleMixin:
    """Levels, times and state of a scheduler whose steps can be undone; see the module's first lines.

    Attributes:
        timesteps (`torch.Tensor` of shape `(order * steps,)`): What the network is told, in the order of the calls.
        sigmas (`torch.Tensor` of shape `(steps + 1,)`): b / a of every level, noisiest first.
        step_index, begin_index (`int` or None): Index in `timesteps` of the next step, of the first one.
        pair (`LatentPair` or None): Both latents after the last step of a run.
    """

    config: Any
    _compatibles = STOCK
    order = 1
    _fewest_steps = 2

    def _start(self) -> None:
        """Called at the end of a subclass's `__init__`."""
        config = self.config
        check_choices(
            config, process=("vp", "flow", "edm"), beta_schedule=BETA_SCHEDULES, timestep_spacing=SPACINGS,
            prediction_type=PREDICTION_TYPES if config.process != "flow" else (*PREDICTION_TYPES, "flow_prediction"),
            on_edit=("raise", "adopt"),
        )  # fmt: skip
        if config.process == "edm" and config.prediction_type == "sample":
            raise ValueError(
                "EDM's preconditioning knows prediction types 'epsilon' and 'v_prediction', got 'sample'."
            )
        if config.process == "vp":
            self.betas, self.alphas_cumprod = noise_schedule(config)
        self.num_inference_steps: int | None = None
        self._levels: list[Level] = []
        self._path: list[int] = []  # the levels in the order in which the run visits them
        self._calls: list[int] = []
        self._times: list[float] = []
        self._pending: LatentPair | None = None
        self.timesteps = torch.arange(config.num_train_timesteps - 1, -1, -1)
        self._forget()

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in [`ConfigMixin`]; tells from a stock scheduler's config whether it is of betas, of a flow or EDM's.

        Raises a ValueError if it is none of these.
        """
        config = settings_for(cls, config)
        if isinstance(config, dict) and "process" not in config and (process := process_of(config)) != "vp":
            kwargs = {"process": process, **kwargs}
            if "flow_shift" in config and kwargs["process"] == "flow":  # DPM-Solver and UniPC call it that
                kwargs = {"shift": config["flow_shift"], **kwargs}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)  # type: ignore[misc]

    # The levels of a run

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Given = None,
        sigmas: Given = None,
        mu: float | None = None,
    ) -> None:
        """Set the levels of the next run and forget the last one; call it before every run, as pipelines do.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps N.
            device (`str` or `torch.device`, *optional*): Where `timesteps` lives.
            timesteps (list or tensor of shape `(N,)`, *optional*): The times themselves, falling also where the run is
                an inversion; for betas and flows.
            sigmas (list or tensor of shape `(N,)`, *optional*): The noise levels themselves; for flows (before their
                shift, as in stock) and EDM.
            mu (`float`, *optional*): The shift of a flow with `use_dynamic_shifting`.

        Raises:
            ValueError: If the times are impossible, or the run could not be undone; the message says why.
        """
        self._check_config()
        given = [value for value in (num_inference_steps, timesteps, sigmas) if value is not None]
        if num_inference_steps is not None and not (
            isinstance(num_inference_steps, Integral) and num_inference_steps > 0
        ):
            raise ValueError(
                f"`num_inference_steps` must be a whole number of at least 1, got {num_inference_steps!r}."
            )
        if self.config.skip_steps < 0:
            raise ValueError(f"`skip_steps` must not be negative, got {self.config.skip_steps}.")
        if not given or (self.config.process == "vp" and len(given) > 1):
            raise ValueError("`set_timesteps` takes either `num_inference_steps` or the levels themselves: pass one.")
        levels = self._make_levels(num_inference_steps, timesteps, sigmas, mu)
        self._levels = levels[self.config.skip_steps :]
        self.num_inference_steps = len(self._levels) - 1
        if self.num_inference_steps < self._fewest_steps:
            raise ValueError(
                f"An invertible run keeps two states: take at least 2 steps, got {len(levels) - 1} of which"
                f" skip_steps={self.config.skip_steps} are left out."
            )
        path = range(len(self._levels))
        self._path = list(reversed(path) if self.config.inverse else path)
        self._calls = self._call_levels()
        self._times = times = [self._levels[index].time for index in self._calls]  # on the host
        dtype = torch.int64 if self.config.process == "vp" else torch.float32
        self.timesteps = torch.tensor(times, dtype=dtype, device=device)
        self.sigmas = torch.tensor([level.noise / level.signal for level in self._levels if level.signal > 0])
        self._plan()
        self._forget()

    def _call_levels(self) -> list[int]:
        """The level of each network call of the run."""
        return self._path[:-1]

    def _plan(self) -> None:
        """Compute what depends on the levels alone."""

    def _check_config(self) -> None:
        config = self.config
        for name in ("clip_sample", "thresholding"):
            if config[name]:
                raise ValueError(
                    f"`{name}` can't be undone: {type(self).__name__} needs {name}=False, "
                    f"as in {type(self).__name__}.from_config(config, {name}=False)."
                )

    def _make_levels(self, steps: int | None, timesteps: Given, sigmas: Given, mu: float | None) -> list[Level]:
        config = self.config
        if config.process == "flow":
            return flow_levels(config, steps, timesteps, sigmas, mu)
        if mu is not None or (config.process == "edm" and timesteps is not None):
            raise ValueError("`mu` is for flow-matching models, and EDM models take `sigmas`, not `timesteps`.")
        if config.process == "edm":
            return edm_levels(config, steps, sigmas)
        if sigmas is not None:
            raise ValueError("`sigmas` are for flow-matching and EDM models: give `timesteps` here.")
        final_alpha = 1.0 if config.set_alpha_to_one else self.alphas_cumprod[0].item()
        return vp_levels(
            config, self.alphas_cumprod, steps, timesteps, final_alpha=final_alpha, clean_time=self._clean_time()
        )

    def _clean_time(self) -> int:
        return 0

    @property
    def init_noise_sigma(self) -> float:
        """What pipelines multiply the first latents by: for EDM as in stock, but 1 where they are a state already."""
        if self.config.process != "edm" or self.config.inverse or self._pending is not None:
            return 1.0
        return math.hypot(self.config.sigma_max, 1.0)

    # The state of a run

    def _forget(self) -> None:
        """Forget the last run; a pair that was set for the next one is kept."""
        self.step_index: int | None = None
        self.begin_index: int | None = None
        self.pair: LatentPair | None = None
        self._begin = 0  # position of the run's first step
        self._given: Tensor | None = None  # the last sample seen
        self._returned: Tensor | None = None  # the last one returned, and its version
        self._version: int | None = None
        self._alarms: dict[str, Tensor] = {}  # what went wrong on an accelerator, not yet read

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run at this index of `timesteps`; pipelines that start from a noised image call it."""
        self.begin_index = begin_index

    def set_pair(self, pair: LatentPair | tuple[Tensor, Tensor]) -> Tensor:
        """Give the next run both latents to start from: `scheduler.pair` of the opposite run.

        Args:
            pair: A `LatentPair`, or two tensors of one shape `(batch, channels, height, width)`.

        Returns:
            The tensor, float64, to hand to the pipeline as `latents` (cast to the dtype of its model).

        Raises:
            ValueError: If the shapes differ.
        """
        first, second = (part if isinstance(part, Latent) else Latent(part) for part in pair[:2])
        if first.value.shape != second.value.shape:
            shapes = f"{tuple(first.value.shape)} and {tuple(second.value.shape)}"
            raise ValueError(f"Both latents of a pair must have one shape, got {shapes}.")
        self._pending = LatentPair(first, second, pair.steps if isinstance(pair, LatentPair) else None)
        return self._pending.first.value

    def _take_pair(self) -> LatentPair | None:
        """The pair that was set for the run that begins, once it is known to come from as long a run."""
        pending, self._pending = self._pending, None
        steps = len(self.timesteps) // self.order - self._begin // self.order
        if pending is not None and pending.steps not in (None, steps):
            raise ValueError(
                f"The pair that was set comes from a run of {pending.steps} steps, and this one has {steps}: call"
                " `set_timesteps` as for the opposite run, and `set_pair` again."
            )
        return pending

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Scale a sample for the network: as it is, but for EDM's preconditioning."""
        if self.config.process != "edm" or not self._levels:
            return sample
        return sample * self._levels[self._calls[self._position_of(timestep)]].scale

    def _position_of(self, timestep: Any) -> int:
        """Index in `timesteps` that a time stands for, read from the device only if it is not a view of them."""
        position = entry_of(timestep, self.timesteps)
        if position is not None:
            return position
        count, expected = len(self._times), self.begin_index if self.step_index is None else self.step_index
        on_host = not isinstance(timestep, Tensor) or timestep.device.type == "cpu"
        if expected is not None and expected < count and not (on_host and self._times[expected] != float(timestep)):
            return expected
        distances = [abs(time - float(timestep)) for time in self._times[:: self.order]]
        return self.order * distances.index(min(distances))

    def _enter(self, model_output: Tensor, timestep: Any, sample: Tensor, eta: float) -> tuple[int, bool]:
        """Position of a step, and whether a run begins with it."""
        if self.num_inference_steps is None:
            raise ValueError("Call `set_timesteps` before `step`: the times of the run are not known yet.")
        if eta != 0:
            raise ValueError(f"{type(self).__name__} is deterministic, else it could not be undone: eta must be 0.")
        require_output_like(model_output, sample)
        position = self._position_of(timestep)
        begins = position != self.step_index or self._returned is None
        if not begins and sample is self._given and sample is not self._returned:
            begins = True  # the sample of the last step once more: its result was not wanted
        if begins:
            begin_index = self.begin_index
            self._forget()
            self.begin_index, self._begin = begin_index, position
        self._given, self.step_index = sample, position + 1
        return position, begins

    def _recognise(self, sample: Tensor, state: Latent) -> Latent:
        """Give the state behind a sample; if it is not the one returned last, act as `on_edit` says."""
        if sample is self._returned and self._version is not None and sample._version == self._version:
            return state  # the very tensor, not written to since: nothing to compare
        if self.config.on_edit == "adopt":
            same = sample == state.value.to(sample.dtype)
            return Latent(torch.where(same, state.value, sample.to(state.value.dtype)))
        self._alarm("edited", (sample != state.value.to(sample.dtype)).any())
        return state

    def _leave(self, state: Latent, sample: Tensor) -> Tensor:
        """Round a state to the dtype of the samples, and remember what is handed out.

        Its layout in memory is always the same: a network may compute other last bits on another one.
        """
        returned = state.value.to(sample.dtype, copy=True, memory_format=torch.contiguous_format)
        self._returned, self._version = returned, None if returned.is_inference() else returned._version
        if self.step_index == len(self.timesteps):
            self._read_alarms()
        return returned

    _MESSAGES = {
        "edited": "The latents were changed between two steps, but {name} keeps two latents that belong together. Use"
        " another scheduler with this pipeline or callback, or on_edit='adopt', which gives up exact inversion.",
        "pair": "The latents given are not those of the pair that was set: hand the pipeline what `set_pair` returned,"
        " in the dtype of its model, or call `set_pair` again.",
        "overflow": "A state left the range of the grid of exact=True, or is not a number: the run diverges. Take more"
        " steps or a smaller guidance scale, or exact=False.",
    }

    def _alarm(self, kind: str, flag: Tensor) -> None:
        """Raise an error if a flag is set: at once on the CPU, at the run's end where reading it would stall."""
        if flag.device.type != "cpu":
            known = self._alarms.get(kind)
            self._alarms[kind] = flag if known is None else known | flag
        elif flag:
            self._fail(kind)

    def _read_alarms(self) -> None:
        for kind, flag in self._alarms.items():
            if flag:
                self._fail(kind)

    def _fail(self, kind: str) -> None:
        self._forget()
        self._pending = None
        raise ValueError(self._MESSAGES[kind].format(name=type(self).__name__))

    # The rest of diffusers' interface

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noised samples at times `(batch,)` or `(1,)`: of `(batch, ...)` tensors, in their dtype."""
        times = timesteps.reshape(-1).to(original_samples.device)
        if self.config.process == "vp":
            alpha = self.alphas_cumprod.to(times.device, state_dtype(times.device))[times.long()]
            signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        elif self.config.process == "flow":
            sigma = times.to(state_dtype(times.device)) / self.config.num_train_timesteps
            signal = 1 - sigma
        else:
            sigma = (4 * times.to(state_dtype(times.device))).exp()
            signal = torch.ones_like(sigma)
        shape, dtype = (-1, *[1] * (original_samples.ndim - 1)), original_samples.dtype
        return signal.to(dtype).view(shape) * original_samples + sigma.to(dtype).view(shape) * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name and order of arguments that flow-matching pipelines use."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Target of v-prediction, sqrt(A) noise - sqrt(1 - A) x0, for training; arguments as in `add_noise`."""
        alpha = self.alphas_cumprod.to(sample.device, sample.dtype)[timesteps.to(sample.device)]
        alpha = alpha.view(-1, *[1] * (sample.ndim - 1))
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * sample

    def __len__(self) -> int:
        return self.config.num_train_timesteps
