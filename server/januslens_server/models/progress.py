"""Progress of loading a model, and the time of its last advance."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from transformers.utils.logging import set_tqdm_hook

# The weights are read, checked for infinities and NaN, and hashed; each pass is one part.
PASSES = 3


class LoadingProgress:
    """How much of a model's loading is done. One thread advances it; any thread may read it."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """`now` returns a time in seconds that never decreases."""
        self._now = now
        self._passes = 0
        self._part = 0.0
        self._of_all: float | None = None
        self.advanced_at = self._of_all_at = now()

    @property
    def fraction(self) -> float:
        """Share of the three passes over the weights that is done, from 0 to 1."""
        return min(1.0, (self._passes + self._part) / PASSES)

    @property
    def shown(self) -> float:
        """The share that callers see: that of all processes if they load the same model."""
        return self.fraction if self._of_all is None else self._of_all

    def show_of_all(self, fraction: float | None) -> None:
        """Report the share that is done in all processes; None = only this process loads."""
        self._of_all, self._of_all_at = fraction, self._now()

    @property
    def last_advanced_at(self) -> float:
        """Time of the last advance in any process."""
        return max(self.advanced_at, self._of_all_at)

    def advance(self, part: float) -> None:
        """Report the share of the current pass that is done."""
        self._part = part
        self.alive()

    def finish_pass(self) -> None:
        """Begin the next pass."""
        self._passes, self._part = self._passes + 1, 0.0
        self.alive()

    def alive(self) -> None:
        """Report work that is not a pass over the weights, such as a download or an index."""
        self.advanced_at = self._now()


_reading = Lock()


@contextmanager
def reading_weights(progress: LoadingProgress) -> Iterator[None]:
    """Report the parameters that transformers reads in this context, as the first pass."""

    def follow(make: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if not arguments:
            return make(*arguments, **named)
        items, *others = arguments
        return make(_followed(list(items), progress), *others, **named)

    with _reading:  # transformers has one hook for the process
        before = set_tqdm_hook(follow)
        try:
            yield
        finally:
            set_tqdm_hook(before)
    progress.finish_pass()


def _followed(items: list[Any], progress: LoadingProgress) -> Iterator[Any]:
    for number, item in enumerate(items, 1):
        yield item
        progress.advance(number / len(items))
