"""Limit what calls do at the same time, in all and for each caller, and run it in threads.

Work that would hold up the event loop runs in one of two pools: `PREPARATION` tokenizes, renders
and resolves requests, `ENCODING` encodes results. They are separate, so that long texts of some
callers do not delay the results of others. A caller, and a model, uses only a part of a pool.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from contextvars import ContextVar, copy_context
from functools import partial
from typing import NamedTuple, TypeVar

from januslens_server.errors import CancelCheck
from januslens_server.scheduling.job import Cancellation

Result = TypeVar("Result")


class _Current(NamedTuple):
    """The caller of the call that a task handles, and the places that the call holds."""

    caller: str
    held: ExitStack


_CURRENT: ContextVar[_Current | None] = ContextVar("current_places", default=None)


def hold_places(caller: str, held: ExitStack) -> None:
    """Give the call of this task to a caller, with places that `leave_places` closes."""
    _CURRENT.set(_Current(caller, held))


def leave_places() -> None:
    """Let another request be received, because the one of this task is admitted or refused."""
    if (current := _CURRENT.get()) is not None:
        current.held.close()


class Places:
    """A number of places, and how many calls are `waiting` for one."""

    def __init__(self, number: int) -> None:
        self._free = asyncio.Semaphore(number)
        self._used = 0
        self.waiting = 0

    @property
    def unused(self) -> bool:
        """Whether no call has a place or waits for one."""
        return self._used == 0 and self.waiting == 0

    async def take(self, held: ExitStack) -> None:
        """Wait for a place, which is free again when `held` is closed."""
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self._used += 1
        held.callback(self._leave)

    def _leave(self) -> None:
        self._used -= 1
        self._free.release()


class FairPlaces:
    """A number of places; a free one goes to the waiting caller that has the fewest."""

    def __init__(self, number: int) -> None:
        self._free = number
        self._used: Counter[str] = Counter()
        self._queue: list[tuple[asyncio.Future[None], str]] = []

    @property
    def waiting(self) -> int:
        """Number of calls that wait for a place."""
        return len(self._queue)

    async def take(self, caller: str, held: ExitStack) -> None:
        """Wait for a place, which is free again when `held` is closed."""
        if self._free:
            self._free -= 1
            self._used[caller] += 1
        else:
            await self._wait(caller)
        held.callback(self._leave, caller)

    async def _wait(self, caller: str) -> None:
        entry = asyncio.get_running_loop().create_future(), caller
        self._queue.append(entry)
        try:
            await entry[0]
        except asyncio.CancelledError:
            if entry in self._queue:
                self._queue.remove(entry)
            else:  # the place was given to this call meanwhile
                self._leave(caller)
            raise

    def _leave(self, caller: str) -> None:
        self._used[caller] -= 1
        self._used += Counter()  # forgets callers without places
        waiting = [entry for entry in self._queue if not entry[0].cancelled()]
        if not waiting:
            self._free += 1
            return
        entry = min(waiting, key=lambda waiting: self._used[waiting[1]])
        self._queue.remove(entry)
        self._used[entry[1]] += 1
        entry[0].set_result(None)


class PlacesByName:
    """The same number of places for each caller or model."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._places: dict[str, Places] = {}

    def of(self, name: str, held: ExitStack) -> Places:
        """The places of one name. They are forgotten when `held` is closed and all are unused."""
        places = self._places.setdefault(name, Places(self._number))
        held.callback(self._forget, name, places)
        return places

    def _forget(self, name: str, places: Places) -> None:
        if places.unused and self._places.get(name) is places:
            del self._places[name]


class Threads:
    """A pool of threads, of which one caller and one model use at most a part."""

    def __init__(self, name: str, number: int, of_one_model: int, of_one_caller: int) -> None:
        """`name` is the prefix of the threads' names; `running` counts the work not yet ended."""
        self._pool = ThreadPoolExecutor(number, name)
        self.running = 0
        self._models = PlacesByName(of_one_model)
        self._callers = PlacesByName(of_one_caller)

    async def run(self, model: str, work: Callable[[], Result]) -> Result:
        """Run `work` in a thread when the task's caller and the model may use one more.

        If the call is cancelled, work that has begun goes on, and the caller's and the model's
        places are free when it has ended.
        """
        loop, current = asyncio.get_running_loop(), _CURRENT.get()
        with ExitStack() as held:
            await self._callers.of(current.caller if current else "", held).take(held)
            await self._models.of(model, held).take(held)
            self.running += 1
            held.callback(self._end)
            job = self._pool.submit(copy_context().run, work)
            places = held.pop_all()

        def leave(_: Future[Result]) -> None:
            with suppress(RuntimeError):  # the loop is closed at the end of the process
                loop.call_soon_threadsafe(places.close)

        job.add_done_callback(leave)
        return await asyncio.wrap_future(job)

    def _end(self) -> None:
        self.running -= 1

    async def run_cancellable(
        self, model: str, work: Callable[[CancelCheck], Result], seconds: float | None
    ) -> Result:
        """Run `work` with a check that raises when the call is cancelled.

        It also raises after `seconds`, the time until the caller's deadline, if there is one.
        """
        stop = Cancellation(seconds)
        try:
            return await self.run(model, partial(work, stop.check))
        except asyncio.CancelledError:
            stop.cancel()
            raise


_NUMBER = max(4, os.cpu_count() or 1)
PREPARATION = Threads("prepare", _NUMBER, _NUMBER // 2, _NUMBER // 4)
# The interpreter's lock lets one thread encode at a time.
ENCODING = Threads("encode", 4, 4, 2)
