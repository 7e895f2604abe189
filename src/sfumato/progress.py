"""The long loops of a run: shown as they go, or, in a rehearsal, only begun, to see what all of it would take."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, NamedTuple, TypeVar

__all__ = ["Phase", "Track", "are_hidden", "hidden", "rehearsing"]

T = TypeVar("T")


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
def hidden(hide: bool = True) -> Iterator[None]:
    """Hide progress bars, for as long as the context lasts."""
    token = _hidden.set(hide)
    try:
        yield
    finally:
        _hidden.reset(token)


def are_hidden() -> bool:
    """Whether progress bars are hidden."""
    return _hidden.get()


class Track(Generic[T]):
    """A loop with a progress bar.

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
        self._items, self._name, self._rehearsed = items, description or "", rehearsed
        from tqdm.auto import tqdm  # here, for commands that have no loop

        hide = not shown or are_hidden()
        self._bar: Any = tqdm(desc=description, disable=hide, initial=start, total=start + len(items))

    def __iter__(self) -> Iterator[T]:
        """Pass over the items, or in a rehearsal over few of them."""
        phases = _rehearsed.get()
        seconds = 0.0
        with self._bar:
            for item in self._items if phases is None else self._items[self._rehearsed] or self._items[-1:]:
                began = time.perf_counter()
                yield item
                seconds = time.perf_counter() - began
                self._bar.update()
        if phases is not None:
            phases.append(Phase(self._name, len(self._items), len(self._items) * seconds))

    def say(self, **facts: str) -> None:
        """Show something behind the bar."""
        self._bar.set_postfix(facts)
