"""The long loops of a run: shown as they go, or, in a rehearsal, only begun, to see what all of it would take.

On a terminal they have bars; where a command writes to a file, as on a cluster, a line now and then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, Generic, NamedTuple, TypeVar

__all__ = ["Phase", "Track", "are_hidden", "hidden", "rehearsing"]

T = TypeVar("T")

INTERVAL = 60.0
"""Seconds between two lines about a loop."""


class Phase(NamedTuple):
    """What a loop would take.

    Attributes:
        name: Its label.
        passes: Of the whole loop.
        seconds: Of the whole loop, if all passes take as long as the last that was rehearsed.
    """

    name: str
    passes: int
    seconds: float


_hidden: ContextVar[bool] = ContextVar("hidden", default=False)
_in_lines: ContextVar[bool] = ContextVar("in_lines", default=False)
_rehearsed: ContextVar[list[Phase] | None] = ContextVar("rehearsed", default=None)


@contextmanager
def rehearsing() -> Iterator[list[Phase]]:
    """Only begin the long loops, for as long as the context lasts; gives a list that they are noted in."""
    phases: list[Phase] = []
    token = _rehearsed.set(phases)
    try:
        yield phases
    finally:
        _rehearsed.reset(token)


@contextmanager
def hidden(hide: bool = True, *, lines: bool = False) -> Iterator[None]:
    """Hide progress bars, for as long as the context lasts; with `lines`, write some in their place."""
    tokens = _hidden.set(hide), _in_lines.set(hide and lines)
    try:
        yield
    finally:
        _hidden.reset(tokens[0])
        _in_lines.reset(tokens[1])


def are_hidden() -> bool:
    """Whether progress bars are hidden."""
    return _hidden.get()


class Track(Generic[T]):
    """A loop with a progress bar, or with lines in its place.

    Args:
        items: What it passes over.
        description: The bar's label.
        shown: Whether there is a bar.
        start: Passes that were made before, of a run that is resumed; they are not among `items`.
        rehearsed: Which passes a rehearsal makes; the last one if there are none of these.
    """

    def __init__(
        self, items: Sequence[T], description: str | None, *, shown: bool = True, start: int = 0,
        rehearsed: slice = slice(0, 1),
    ) -> None:  # fmt: skip
        self._items, self._name, self._rehearsed, self._start = items, description or "", rehearsed, start
        self._lines, self._facts = shown and _in_lines.get(), ""
        from tqdm.auto import tqdm  # here, for commands that have no loop

        hide = not shown or are_hidden()
        self._bar: Any = tqdm(desc=description, disable=hide, initial=start, total=start + len(items))

    def __iter__(self) -> Iterator[T]:
        """Pass over the items, or in a rehearsal over few of them."""
        phases = _rehearsed.get()
        seconds, all_began = 0.0, time.perf_counter()
        told = all_began
        with self._bar:
            passed = self._items if phases is None else self._items[self._rehearsed] or self._items[-1:]
            for done, item in enumerate(passed, 1):
                began = time.perf_counter()
                yield item
                now = time.perf_counter()
                seconds = now - began
                self._bar.update()
                if self._lines and phases is None and now - told >= INTERVAL:
                    self._tell(done, (now - all_began) / done)
                    told = now
        if phases is not None:
            phases.append(Phase(self._name, len(self._items), len(self._items) * seconds))

    def _tell(self, done: int, seconds: float) -> None:
        left = timedelta(seconds=round(seconds * (len(self._items) - done)))
        count = f"{self._start + done} of {self._start + len(self._items)}"
        print(f"{self._name}: {count}{self._facts}, {left} left", file=sys.stderr, flush=True)

    def say(self, **facts: str) -> None:
        """Show something behind the bar."""
        self._bar.set_postfix(facts)
        self._facts = "".join(f", {name} {fact}" for name, fact in facts.items())
