"""Invertible two-step sampling: x_target = Phi(now -> target) + g (x_other - Phi(now -> other)).

`other` is the state before `now` on the way, `target` the one after it. The rule is linear in `other`, so it can be
solved for it: the same rule with the gain 1 / g walks back. BDIA has one gain for all steps, O-BELM one for each step,
and g = 0 is DDIM (which can't be walked back).

The grid of `exact`. Let c be scales with c_target = g c_other. Then w = x / c obeys w_clean = w_noisy + delta with
delta = Phi(now -> clean) / c_clean - Phi(now -> noisy) / c_noisy, which depends on `now` alone. States are kept as
x = whole * GRID * c + fraction with `whole` in int64, and delta / GRID is rounded to an integer: sampling adds it,
inversion takes it away again, and the sum of integers loses nothing. `fraction` is what a given first state has beyond
the grid; no step touches it. Both directions evaluate the same network on the same tensor, so any network that repeats
itself will do, whatever its precision. The grid's spacing is at most GRID = 2^-40 (1e-12); its range is 2^62 spacings,
2^22 = 4e6 where c = 1.
"""

from typing import Any

import torch
from torch import Tensor

from .levels import Level
from .reversible import Latent, LatentPair, ReversibleMixin, ReversibleSchedulerOutput

GRID = 2.0**-40
_LIMIT = 2.0**61  # of a state and of an increment, in spacings: their sum still fits into int64
_NARROWEST = 2.0**-16  # scales below this would leave a range of less than 64


class TwoStepMixin(ReversibleMixin):
    """A reversible scheduler that calls the network once a step and keeps the state before; subclasses give gains.

    Attributes:
        condition_number (`float`): How much an error in a state may grow on the way from the clean end to the noise:
            the largest product of 1 / g over the last steps of the schedule.
    """

    def _gain(self, noisy: Level, now: Level, clean: Level) -> float:
        """The gain g of a step of sampling, from the noisy neighbour to the clean one; 0 for DDIM."""
        raise NotImplementedError

    def _plan(self) -> None:
        levels, path = self._levels, self._path
        self._first = [levels[now].to(levels[target]) for now, target in zip(path, path[1:], strict=False)]
        steps = list(zip(path, path[1:], path[2:], strict=False))
        gains = [self._gain(*neighbours) for neighbours in zip(levels, levels[1:], levels[2:], strict=False)]
        if self.config.inverse and 0 in gains:
            raise ValueError("A gain of 0 is DDIM, which has no exact inverse: take gamma > 0.")
        self.condition_number = _largest_product(gains[::-1])
        self._then = []  # coefficients on now, on the model's output, on other
        for (other, now, target), gain in zip(steps, self._in_order(gains), strict=True):
            ahead, behind = levels[now].to(levels[target]), levels[now].to(levels[other])
            x, output = (a - gain * b for a, b in zip(ahead, behind, strict=True))
            self._then.append((x, output, gain))
        self._scales = [1.0] * len(levels)
        if self.config.exact:
            self._plan_grid(steps, gains)

    def _in_order(self, gains: list[float]) -> list[float]:
        """Gains of a run's own steps."""
        return [1 / gain for gain in reversed(gains)] if self.config.inverse else gains

    def _plan_grid(self, steps: list[tuple[int, int, int]], gains: list[float]) -> None:
        """Scales c of the levels, and the coefficients of delta / GRID on now and on the model's output.

        Both directions must compute the same numbers, bit for bit: nothing here depends on the direction.
        """
        if self.config.on_edit == "adopt":
            raise ValueError("exact=True can't adopt latents that were changed between steps: use on_edit='raise'.")
        if 0 in gains:
            raise ValueError("exact=True needs gains other than 0: DDIM (gamma=0) has no exact inverse.")
        for index, gain in enumerate(gains):
            self._scales[index + 2] = self._scales[index] * gain
        largest = max(self._scales)
        self._scales = [scale / largest for scale in self._scales]
        if min(self._scales) < _NARROWEST:
            raise ValueError(
                f"exact=True can't hold this run on its grid: its gains multiply to {1 / min(self._scales):.3g}. Take "
                "gamma=1, fewer steps or timestep_spacing='trailing', or exact=False."
            )
        self._deltas = []
        for other, now, target in steps:
            clean, noisy = max(other, target), min(other, target)
            sides = (self._levels[now].to(self._levels[index]) for index in (clean, noisy))
            spacings = (GRID * self._scales[index] for index in (clean, noisy))
            ahead, behind = ([c / unit for c in side] for side, unit in zip(sides, spacings, strict=True))
            self._deltas.append((ahead[0] - behind[0], ahead[1] - behind[1]))

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
        """Take the sample one step further on the schedule: towards the data, or towards the noise if `inverse`.

        The first step of a run is DDIM's, or, if a pair was set, goes to the second latent of the pair.

        Args:
            model_output (`torch.Tensor` of shape `(batch, channels, height, width)`): The model's prediction.
            timestep (`float` or scalar `torch.Tensor`): The time that the model was given, of `timesteps`.
            sample (`torch.Tensor` of the same shape): What the last step returned, in the model's units.
            eta (`float`): Must be 0.
            use_clipped_model_output (`bool`): Without effect, for nothing is clipped; taken for pixel pipelines, which
                pass it.
            generator (`torch.Generator` or list of them): Without effect, for nothing is drawn; likewise.
            return_dict (`bool`): Return a [`ReversibleSchedulerOutput`] rather than a tuple.

        Returns:
            [`ReversibleSchedulerOutput`], or a tuple with its `prev_sample`; samples in `sample.dtype`.

        Raises:
            ValueError: Before `set_timesteps`, for `eta` > 0, or if `sample` is not what the last step returned.
        """
        position, begins = self._enter(timestep, sample, eta)
        output = model_output.to(self._dtype_of(sample))
        if begins:
            self._now, self._other, pending = self._begin_run(sample)
        else:
            self._now, pending = self._recognise(sample, self._now), None
        if pending is not None:
            target = pending
        elif self._other is None:
            x, out = self._first[position]
            target = self._snap(torch.add(x * self._now.value, output, alpha=out), self._path[position + 1])
        else:
            target = self._two_step(position - 1, output)
        prediction = self._predict_clean(position, output).to(sample.dtype) if return_dict else None
        self._now, self._other = target, self._now
        if position + 1 == len(self.timesteps):
            self.pair = LatentPair(self._now, self._other, len(self.timesteps) - self._begin)
        previous = self._leave(target, sample)
        return ReversibleSchedulerOutput(previous, prediction) if return_dict else (previous,)

    def _begin_run(self, sample: Tensor) -> tuple[Latent, Latent | None, Latent | None]:
        """The first state, the one before it (there is none), and the one after it if a pair was set."""
        pending, self._pending = self._pending, None
        if pending is None:
            return self._snap(sample.to(self._dtype_of(sample)), self._path[self._begin]), None, None
        index = self._path[self._begin]
        first, second = (
            part if (part.whole is None) != self.config.exact else self._snap(part.value.to(sample.device), level)
            for part, level in zip(pending[:2], (index, self._path[self._begin + 1]), strict=True)
        )
        if first.value.shape != sample.shape:
            self._fail("pair")
        self._alarm("pair", (sample != first.value.to(sample.dtype)).any())
        return first, None, second

    def _two_step(self, number: int, output: Tensor) -> Latent:
        now, other = self._now.value, self._other
        assert other is not None
        if not self.config.exact:
            x, out, gain = self._then[number]
            value = torch.add(x * now, output, alpha=out)
            return Latent(value.add_(other.value, alpha=gain) if gain else value)
        assert other.whole is not None and other.fraction is not None
        x, out = self._deltas[number]
        delta = torch.add(x * now, output, alpha=out).round_()
        self._alarm("overflow", ~(delta.abs() < _LIMIT).all())
        delta = delta.to(torch.int64)
        whole = other.whole - delta if self.config.inverse else other.whole + delta
        self._alarm("overflow", (whole.abs() >= _LIMIT).any())
        return self._place(whole, other.fraction, self._path[number + 2])

    def _snap(self, value: Tensor, index: int) -> Latent:
        """Make a state of a value at a level; with `exact`, put it on the grid and keep what is beyond it."""
        if not self.config.exact:
            return Latent(value)
        spacing = GRID * self._scales[index]
        whole = (value / spacing).round_()
        self._alarm("overflow", ~(whole.abs() < _LIMIT).all())
        state = whole.to(torch.int64)
        return Latent(value, state, value - state.to(value.dtype) * spacing)

    def _place(self, whole: Tensor, fraction: Tensor, index: int) -> Latent:
        return Latent(whole.to(fraction.dtype) * (GRID * self._scales[index]) + fraction, whole, fraction)

    def _predict_clean(self, position: int, output: Tensor) -> Tensor:
        x, out = self._levels[self._path[position]].clean
        return torch.add(x * self._now.value, output, alpha=out)


def _largest_product(gains: list[float]) -> float:
    """Largest running product of 1 / g, in the order in which an inversion meets them; infinite for DDIM."""
    largest = product = 1.0
    for gain in gains:
        if gain == 0:
            return float("inf")
        product /= gain
        largest = max(largest, product)
    return largest
