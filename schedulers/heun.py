"""Heun's increments for a two-step sampler: the slope is averaged over both ends of an increment.

With y = x / a, s = b / a and e the slope (see `levels.py`), an increment from level t to a neighbour k is

    Euler  y_k = y_t + (s_k - s_t) e(x_t, t)
    Heun   y_k = y_t + (s_k - s_t) (e(x_t, t) + e(x_k, k)) / 2, with x_k the point that Euler's increment reaches

as in Algorithm 1 of Karras et al., arXiv 2206.00364, whose last increment, to s = 0, is Euler's as well. A two-step
sampler takes two increments from every state, one to each side, so a step costs three network calls: at the state,
at the cleaner point, at the noisier one. Both directions make the same calls in the same order from the same state,
so the step is undone as before.

Next to an end of the run, where one of the increments is Euler's or missing, the call at the state is made again in
the place of the one that is not needed: every step begins at a multiple of three, as pipelines that begin amid a run
expect.
"""

from typing import Any

import torch
from torch import Tensor

from .coupled import Call, TwoStepMixin
from .levels import Level
from .noise_schedule import state_dtype
from .reversible import Latent, LatentPair, ReversibleSchedulerOutput


class HeunMixin(TwoStepMixin):
    """A two-step scheduler whose increments are Heun's if its `solver` is `"heun"`, at three calls a step."""

    _shown: Latent  # what the network sees next
    _state: Tensor  # of the step, and its slope
    _slope: Tensor
    _reached: dict[int, Tensor]  # the ends of the step's increments, by level
    _second: Latent | None  # of the pair that was set

    def _start(self) -> None:
        super()._start()
        if self.config.solver == "heun":
            self.order = 3

    def _call_levels(self) -> list[int]:
        if self.config.solver == "euler":
            return super()._call_levels()
        clean_end = len(self._levels) - 1
        calls: list[int] = []
        for now in self._path[:-1]:
            ends = [level for level in self._sides(now) if clean_end not in (now, level)]
            calls += [now] * (self.order - len(ends)) + ends
        return calls

    def _plan(self) -> None:
        super()._plan()
        if self.config.solver == "heun" and self._levels[0].signal == 0:
            raise ValueError(
                "Heun's increments need some signal at every time, and A = 0 at the first: use solver='euler', or"
                " start below it (rescale_betas_zero_snr, steps_offset, timestep_spacing)."
            )

    def calls(self, begin: int = 0) -> list[Call]:
        """See `CoupledMixin.calls`; a step of Heun's is no such call."""
        if self.config.solver == "heun":
            raise ValueError("Heun's steps can't be walked back for gradients: take solver='euler'.")
        return super().calls(begin)

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
        """See `CoupledMixin.step`; Heun's may return a point that only the network is to see."""
        if self.config.solver == "euler":
            return super().step(model_output, timestep, sample, eta, use_clipped_model_output, generator, return_dict)
        position, begins = self._enter(model_output, timestep, sample, eta)
        output = model_output.to(state_dtype(sample.device))
        index, level = position // self.order, self._calls[position]
        now = self._path[index]
        if begins:
            self._begin_run(sample)
        else:
            self._shown = self._recognise(sample, self._shown)
        seen = self._shown.value
        prediction = self._predict_clean(position, seen, output).to(sample.dtype) if return_dict else None
        slope = _weighted(self._levels[level].slope, seen, output)
        if level == now:
            self._latents[-1] = self._shown  # it may have been adopted
            self._state, self._slope = seen, slope
            self._reached = {side: self._increment(now, side, slope) for side in self._sides(now)}
        else:
            self._reached[level] = self._increment(now, level, (self._slope + slope) / 2)
        if (position + 1) % self.order == 0:
            self._shown = self._advance(index)
        elif (after := self._calls[position + 1]) != now:
            self._shown = Latent(self._increment(now, after, self._slope))
        if position + 1 == len(self._calls):
            self.pair = LatentPair(self._latents[1], self._latents[0], index + 1 - self._begin // self.order)
        previous = self._leave(self._shown, sample)
        return (previous,) if prediction is None else ReversibleSchedulerOutput(previous, prediction)

    def _begin_run(self, sample: Tensor) -> Latent | None:
        second = super()._begin_run(sample)
        if self.config.solver == "heun":
            if self._begin % self.order:
                raise ValueError(f"Heun's steps take three calls: a run can't begin at call {self._begin}, amid one.")
            self._shown, self._second = self._latents[0], second
            self._latents = [self._shown]
        return second

    def _sides(self, now: int) -> list[int]:
        return [level for level in (now + 1, now - 1) if 0 <= level < len(self._levels)]

    def _increment(self, now: int, side: int, slope: Tensor) -> Tensor:
        """Where an increment from the state of the step ends, given the slope it is taken with."""
        here, there = self._levels[now], self._levels[side]
        return torch.add(there.signal / here.signal * self._state, slope, alpha=_gain_of_slope(here, there))

    def _advance(self, index: int) -> Latent:
        """Finish a step: the state at its target, from both increments and the state before."""
        now, target = self._path[index], self._path[index + 1]
        if len(self._latents) == 1:
            state = self._snap(self._reached[target], target) if self._second is None else self._second
            self._latents = [self._latents[0], state]
            return state
        before, other = self._latents[0], self._path[index - 1]
        if self.config.exact:
            clean, noisy = (self._reached[level] / self._spacing(level) for level in self._sides(now))
            state = self._moved_on_grid(before, clean - noisy, target)
        else:
            gain = self._gains[index - 1]
            state = Latent(torch.add(self._reached[target], before.value - self._reached[other], alpha=gain))
        self._latents = [self._latents[1], state]
        return state


def _gain_of_slope(here: Level, there: Level) -> float:
    return there.noise - there.signal / here.signal * here.noise


def _weighted(weights: tuple[float, float], seen: Tensor, output: Tensor) -> Tensor:
    return torch.add(weights[0] * seen, output, alpha=weights[1])
