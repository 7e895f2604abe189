"""What a sampler carries from one step to the next: where its run is, and its state before that was rounded.

A run goes over the times of `set_timesteps`, which fall strictly. The index of a step comes from the host alone where
that is possible, and its coefficients are plain numbers, so that no step waits for an accelerator.
"""

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .noise_schedule import entry_of, state_dtype

Generators = torch.Generator | list[torch.Generator] | None


def require_like(sample: Tensor, **tensors: Tensor | None) -> None:
    """Raise a ValueError for the first tensor that has not the sample's shape."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != sample.shape:
            raise ValueError(
                f"`{name}` must have the shape of the sample, {tuple(sample.shape)}, got {tuple(tensor.shape)}."
            )


def noise_like(like: Tensor, generator: Generators, variance_noise: Tensor | None) -> Tensor:
    """The noise that was given, or one drawn as stock schedulers draw it: where the prediction is, in its dtype."""
    if variance_noise is not None:
        return variance_noise
    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)


class CarriedStateMixin:
    """The run of a sampler with one state.

    Attributes:
        step_index, begin_index (`int` or None): Index in `timesteps` of the next step, of the first one.
    """

    config: Any
    num_inference_steps: int | None

    def _start(self, times: list[int], device: str | torch.device | None) -> None:
        """Set the times of the next run and forget the last one."""
        self._times = times  # on the host
        self.timesteps = torch.tensor(times, dtype=torch.int64, device=device)
        self.step_index: int | None = None
        self.begin_index: int | None = None
        self._sweep = ""
        self._tables: dict[tuple[str, torch.device], Tensor] = {}
        self._forget()

    def _forget(self) -> None:
        """The next state comes from the caller alone."""
        self._master: Tensor | None = None  # the state before it was rounded
        self._handed: Tensor | None = None  # and after: what the caller was given

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run at this index of `timesteps`; pipelines that start from a noised image call it."""
        self.begin_index = begin_index

    def _enter(self, timestep: Any, sweep: str = "", follows: str | None = None) -> tuple[int, int]:
        """The time of a step and the next one, -1 after the last.

        A run begins here, and takes the sample as it is, unless the last step led to this time, or ended a sweep that
        this one `follows`.
        """
        if self.num_inference_steps is None:
            raise ValueError("Call `set_timesteps` before `step`: the times of the run are not known yet.")
        time, index = self._locate(timestep)
        followed = self._sweep == follows and self.step_index == len(self._times)
        if index != self.step_index and not followed:
            self._forget()
        self.step_index, self._sweep = index + 1, sweep
        return time, self._times[index + 1] if index + 1 < len(self._times) else -1

    def _locate(self, timestep: Any) -> tuple[int, int]:
        """A time and the index of the last one of the run that is not below it, -1 if there is none."""
        if isinstance(timestep, Tensor) and timestep.numel() != 1:
            raise ValueError(f"A step goes from one time for the whole batch, got {timestep.numel()} in `timestep`.")
        index = entry_of(timestep, self.timesteps)
        if index is None and isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            index = self.begin_index if self.step_index is None else self.step_index
        if index is not None and index < len(self._times):
            return self._times[index], index
        time, last = float(timestep), self.config.num_train_timesteps - 1
        if time % 1 or not 0 <= time <= last:
            raise ValueError(f"`timestep` must be a whole number in [0, {last}], got {time:g}.")
        return int(time), sum(entry >= time for entry in self._times) - 1

    def _unrounded(self, sample: Tensor) -> Tensor:
        """The state behind a sample, as it was before rounding where the caller left the values alone."""
        x = sample.to(state_dtype(sample.device))
        master, handed = self._master, self._handed
        if master is None or handed is None or handed.shape != sample.shape:
            return x
        if handed.dtype != sample.dtype or handed.device != sample.device:
            return x
        return torch.where(sample == handed, master, x)

    def _hand_out(self, state: Tensor, sample: Tensor, *, keep: bool) -> Tensor:
        """A state in the dtype of the samples, remembered if the run goes on (`keep`) and something was rounded."""
        rounded = state.to(sample.dtype)
        self._forget()
        if keep and rounded is not state:
            self._master, self._handed = state, rounded.clone()
        return rounded

    def _at(self, table: str, timesteps: Any, like: Tensor) -> Tensor:
        """Entries of an attribute `(T,)` at times `(batch,)`, `(1,)` or a number, to broadcast over a batch."""
        key = table, like.device
        if key not in self._tables:
            self._tables[key] = getattr(self, table).to(state_dtype(like.device)).to(like.device)
        if not isinstance(timesteps, Tensor):
            timesteps = torch.full((1,), int(timesteps), device=like.device)
        # index_select, because indexing with a scalar tensor reads it back to the host
        entries = self._tables[key].index_select(0, timesteps.reshape(-1).to(like.device, torch.int64))
        return entries.reshape(-1, *[1] * (like.ndim - 1))

    def _check_training(self, original: Tensor, timesteps: Tensor, **tensors: Tensor | None) -> None:
        """Raise a ValueError if samples, their noises and their times do not go together."""
        require_like(original, **tensors)
        if timesteps.numel() not in (1, len(original)):
            given = f"one time or {len(original)}, one a sample, got {timesteps.numel()}"
            raise ValueError(f"`timesteps` must hold {given}.")
        self._check_times(timesteps)

    def _check_times(self, timesteps: Tensor) -> None:
        """Raise a ValueError for times outside the training schedule, where looking at them does not stall."""
        count = self.config.num_train_timesteps
        if timesteps.device.type == "cpu" and bool(((timesteps < 0) | (timesteps >= count)).any()):
            raise ValueError(f"`timesteps` must lie in [0, {count - 1}], got {timesteps.tolist()}.")

    def __len__(self) -> int:
        return self.config.num_train_timesteps
