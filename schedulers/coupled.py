"""Two coupled latents: each network call moves one of them by what the network makes of the other.

A call is `moved <- keep * moved + add * seen + output * network(seen)`, at times followed by moves without a network.
BDIA, O-BELM and EDICT, sampling and inverting, are runs of such calls with other numbers. A call is undone by solving
its line for `moved`, since `seen`, and with it what the network makes of it, is still there.

Two-step sampling: x_target = Phi(now -> target) + g (x_other - Phi(now -> other)), where `other` is the state before
`now` on the way and `target` the one after it. The same rule with the gain 1 / g walks back. BDIA has one gain for all
steps, O-BELM one for each step, and g = 0 is DDIM (which can't be walked back).

The grid of `exact`. Let c be scales with c_target = g c_other. Then w = x / c obeys w_clean = w_noisy + delta with
delta = Phi(now -> clean) / c_clean - Phi(now -> noisy) / c_noisy, which depends on `now` alone. States are kept as
x = whole * GRID * c + fraction with `whole` in int64, and delta / GRID is rounded to an integer: sampling adds it,
inversion takes it away again, and the sum of integers loses nothing. `fraction` is what a given first state has beyond
the grid; no step touches it. Both directions evaluate the same network on the same tensor, so any network that repeats
itself will do, whatever its precision. The grid's spacing is at most GRID = 2^-40 (1e-12); its range is 2^62 spacings,
2^22 = 4e6 where c = 1.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.utils import logging
from torch import Tensor

from .levels import Level
from .noise_schedule import state_dtype
from .reversible import Latent, LatentPair, ReversibleMixin, ReversibleSchedulerOutput

GRID = 2.0**-40
_VISIBLE = 1e-6  # a relative error of a round trip that is worth a warning
_LIMIT = 2.0**61  # of a state and of an increment, in spacings: their sum still fits into int64
_NARROWEST = 2.0**-16  # scales below this would leave a range of less than 64

logger = logging.get_logger(__name__)


class Move(NamedTuple):
    """`moved <- keep * moved + add * other`, with `moved` the index, 0 or 1, of a latent."""

    moved: int
    keep: float
    add: float


@dataclass(frozen=True)
class Call:
    """What happens to the two latents at one network call.

    Attributes:
        seen: Index, 0 or 1, of the latent that the network sees; the other one is moved.
        keep: Coefficient of the moved latent, 0 where it is made anew.
        add: Coefficient of the latent seen.
        output: Coefficient of the model's output.
        then: Moves that follow.
    """

    seen: int
    keep: float
    add: float
    output: float
    then: tuple[Move, ...] = ()


class CoupledMixin(ReversibleMixin, ABC):
    """A reversible scheduler of two coupled latents; subclasses give the calls of a run."""

    condition_number: float
    _latents: list[Latent]  # of the run, ours alone: they are moved in place
    _run: list[Call]

    @abstractmethod
    def calls(self, begin: int = 0) -> list[Call]:
        """What each network call of a run does to the two latents.

        Args:
            begin: Index in `timesteps` at which the run begins.

        Returns:
            One `Call` for every entry of ``timesteps[begin:]``.
        """

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
        """Move one latent by what the network made of the other: towards the data, or the noise if `inverse`.

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
            [`ReversibleSchedulerOutput`], or a tuple with its `prev_sample`: what the network is to see next; samples
            in `sample.dtype`.

        Raises:
            ValueError: Before `set_timesteps`, for `eta` > 0, for shapes that differ, or if `sample` is not what the
                last step returned.
        """
        position, begins = self._enter(model_output, timestep, sample, eta)
        output = model_output.to(state_dtype(sample.device))
        if begins:
            self._run = self.calls(position)
            second = self._begin_run(sample)
        call = self._run[position - self._begin]
        if not begins:
            second = None
            self._latents[call.seen] = self._recognise(sample, self._latents[call.seen])
        seen = self._latents[call.seen].value
        prediction = self._predict_clean(position, seen, output).to(sample.dtype) if return_dict else None
        moved = 1 - call.seen
        self._latents[moved] = self._move(call, position, output) if second is None else second
        self._apply(call.then)
        if position + 1 < len(self.timesteps):
            shown = self._run[position + 1 - self._begin].seen
        else:
            shown = self.result_of(self._run)
            self.pair = LatentPair(self._latents[shown], self._latents[1 - shown], len(self._run) // self.order)
        previous = self._leave(self._latents[shown], sample)
        return (previous,) if prediction is None else ReversibleSchedulerOutput(previous, prediction)

    def _warn_if_lost(self) -> None:
        """Say so if a round trip amplifies float64's rounding to what can be seen."""
        error = self.condition_number * torch.finfo(torch.float64).eps
        if self.config.inverse and not self.config.get("exact") and error > _VISIBLE:
            logger.warning(
                f"This inversion amplifies rounding {self.condition_number:.0e} times: the round trip will be off by"
                f" about {error:.0e}. Take fewer steps, or gamma or mixing_coeff nearer to 1."
            )

    @abstractmethod
    def _begin_run(self, sample: Tensor) -> Latent | None:
        """Set the latents that a run starts from; gives the second one if a pair was set."""

    @abstractmethod
    def result_of(self, run: list[Call]) -> int:
        """Index of the latent that is the result of a run."""

    def _check_pair(self, sample: Tensor, latent: Latent) -> None:
        """Raise an error if the sample that a run begins with is not the rounded latent of the pair that was set."""
        if latent.value.shape != sample.shape:
            self._fail("pair")
        self._alarm("pair", (sample != latent.value.to(sample.dtype)).any())

    def _move(self, call: Call, position: int, output: Tensor) -> Latent:
        """Move a latent, in place: nobody else holds it, and new memory would cost more than the arithmetic."""
        seen = self._latents[call.seen].value
        if call.keep == 0:
            value = torch.mul(seen, call.add)
        else:
            value = _moved(self._latents[1 - call.seen].value, seen, call.keep, call.add)
        return Latent(value.add_(output, alpha=call.output))

    def _apply(self, moves: tuple[Move, ...]) -> None:
        for moved, keep, add in moves:
            _moved(self._latents[moved].value, self._latents[1 - moved].value, keep, add)

    def _predict_clean(self, position: int, seen: Tensor, output: Tensor) -> Tensor:
        x, out = self._levels[self._calls[position]].clean
        return torch.add(x * seen, output, alpha=out)


class TwoStepMixin(CoupledMixin):
    """A reversible scheduler that calls the network once a step and keeps the state before; subclasses give gains.

    Attributes:
        condition_number (`float`): How much an error in a state may grow on the way from the clean end to the noise:
            the largest product of 1 / g over the last steps of the schedule.
    """

    @abstractmethod
    def _gain(self, noisy: Level, now: Level, clean: Level) -> float:
        """The gain g of a step of sampling, from the noisy neighbour to the clean one; 0 for DDIM."""

    def _plan(self) -> None:
        levels, path = self._levels, self._path
        gains = [self._gain(*neighbours) for neighbours in zip(levels, levels[1:], levels[2:], strict=False)]
        if self.config.inverse and 0 in gains:
            raise ValueError("A gain of 0 is DDIM, which has no exact inverse: take gamma > 0.")
        self.condition_number = _largest_product(gains[::-1])
        self._warn_if_lost()
        self._gains = self._in_order(gains)
        self._scales = [1.0] * len(levels)
        if self.config.exact:
            self._plan_grid(list(zip(path, path[1:], path[2:], strict=False)), gains)

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
            spacings = (self._spacing(index) for index in (clean, noisy))
            ahead, behind = ([c / unit for c in side] for side, unit in zip(sides, spacings, strict=True))
            self._deltas.append((ahead[0] - behind[0], ahead[1] - behind[1]))

    def calls(self, begin: int = 0) -> list[Call]:
        """See `CoupledMixin.calls`: the first call is DDIM's, and the latents take turns."""
        visited = [self._levels[index] for index in self._path[begin:]]
        run = [Call(0, 0.0, *visited[0].to(visited[1]))]
        for other, now, target, gain in zip(visited, visited[1:], visited[2:], self._gains[begin:], strict=False):
            x, output = (ahead - gain * behind for ahead, behind in zip(now.to(target), now.to(other), strict=True))
            run.append(Call(1 - run[-1].seen, gain, x, output))
        return run

    def _begin_run(self, sample: Tensor) -> Latent | None:
        pending = self._take_pair()
        step = self._begin // self.order
        index, after = self._path[step], self._path[step + 1]
        if pending is None:
            self._latents = [self._snap(sample.to(state_dtype(sample.device), copy=True), index)] * 2
            return None
        first, second = (
            self._adopted(latent, level, sample) for latent, level in zip(pending[:2], (index, after), strict=True)
        )
        self._check_pair(sample, first)
        self._latents = [first, second]
        return second

    def _adopted(self, latent: Latent, index: int, sample: Tensor) -> Latent:
        """A latent of a pair, as our own copy, in the representation and on the device of this run."""
        if self.config.exact and latent.whole is not None:
            return Latent(*(part.to(sample.device, copy=True) for part in latent if part is not None))
        return self._snap(latent.value.to(sample.device, state_dtype(sample.device), copy=True), index)

    def result_of(self, run: list[Call]) -> int:
        """The latent that the last call moved."""
        return 1 - run[-1].seen

    def _move(self, call: Call, position: int, output: Tensor) -> Latent:
        if not self.config.exact:
            return super()._move(call, position, output)
        seen, other = self._latents[call.seen].value, self._latents[1 - call.seen]
        if call.keep == 0:
            return self._snap(torch.add(call.add * seen, output, alpha=call.output), self._path[position + 1])
        x, out = self._deltas[position - 1]
        return self._moved_on_grid(other, torch.add(x * seen, output, alpha=out), self._path[position + 1])

    def _moved_on_grid(self, other: Latent, delta: Tensor, index: int) -> Latent:
        """The state at a level, from the state before on the way and `delta / GRID`."""
        assert other.whole is not None and other.fraction is not None
        delta = delta.round()
        self._alarm("overflow", ~(delta.abs() < _LIMIT).all())
        delta = delta.to(torch.int64)
        whole = other.whole - delta if self.config.inverse else other.whole + delta
        self._alarm("overflow", (whole.abs() >= _LIMIT).any())
        return Latent(whole.to(other.value.dtype) * self._spacing(index) + other.fraction, whole, other.fraction)

    def _spacing(self, index: int) -> float:
        """Spacing of the grid at a level."""
        return GRID * self._scales[index]

    def _snap(self, value: Tensor, index: int) -> Latent:
        """Make a state of a value at a level; with `exact`, put it on the grid and keep what is beyond it."""
        if not self.config.exact:
            return Latent(value)
        spacing = self._spacing(index)
        whole = (value / spacing).round_()
        self._alarm("overflow", ~(whole.abs() < _LIMIT).all())
        state = whole.to(torch.int64)
        return Latent(value, state, value - state.to(value.dtype) * spacing)


def _largest_product(gains: list[float]) -> float:
    """Largest running product of 1 / g, in the order in which an inversion meets them; infinite for DDIM."""
    largest = product = 1.0
    for gain in gains:
        if gain == 0:
            return float("inf")
        product /= gain
        largest = max(largest, product)
    return largest


def _moved(value: Tensor, other: Tensor, keep: float, add: float) -> Tensor:
    if keep != 1:
        value.mul_(keep)
    return value.add_(other, alpha=add) if add else value
