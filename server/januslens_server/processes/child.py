"""A server process as its supervisor sees it, and the process's entry point."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from multiprocessing.connection import Connection
from pathlib import Path

from prometheus_client import values

from januslens_server import spans
from januslens_server.config import ServerSettings
from januslens_server.logs import configure_logging

# Not forked: gRPC and torch have threads, which a fork loses.
CONTEXT = multiprocessing.get_context("spawn")


class MemberEnded(Exception):
    """A process ended before it came to serve."""

    def __init__(self, number: int, status: int) -> None:
        """`status` is what a shell would say of it."""
        super().__init__(f"process {number} ended with status {status} before it served")
        self.status = status


class Member:
    """A process that has been started, and what becomes of it."""

    def __init__(self, number: int, settings: ServerSettings, folder: Path) -> None:
        """Start it; it counts in `folder`."""
        self.number = number
        loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[dict[str, bool]] = loop.create_future()
        self._listening: asyncio.Future[None] = loop.create_future()
        self._ended: asyncio.Future[int] = loop.create_future()
        self._pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(
            target=enter, args=(number, settings, folder, theirs), daemon=True
        )
        self._process.start()
        theirs.close()
        threading.Thread(target=self._follow, args=(loop,), daemon=True).start()

    @property
    def serves(self) -> bool:
        """Whether it takes calls."""
        return self._listening.done() and not self._ended.done()

    async def loaded(self) -> dict[str, bool]:
        """Its models, once all have been tried, and which can be served. Raises `MemberEnded`."""
        return await asyncio.shield(self._loaded)

    async def open(self) -> None:
        """Have it open the port. Raises `MemberEnded`."""
        self.order(Order.OPEN)
        await asyncio.shield(self._listening)

    async def ended(self) -> int:
        """Its exit status; beyond 128, a signal's."""
        return await asyncio.shield(self._ended)

    def order(self, order: Order) -> None:
        """Tell it; one that has ended hears nothing."""
        with suppress(OSError):
            self._pipe.send(order)

    async def end(self, seconds: float) -> bool:
        """Let it drain, and kill it if it takes longer; gives whether it ended by itself."""
        self._process.terminate()
        try:
            await asyncio.wait_for(self.ended(), seconds)
        except TimeoutError:
            self._process.kill()
            await self.ended()
            return False
        return True

    def _follow(self, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: pass on what it says until it ends."""
        with suppress(EOFError, OSError):
            while True:
                loop.call_soon_threadsafe(self._said, self._pipe.recv())
        self._process.join()
        code = self._process.exitcode or 0
        with suppress(RuntimeError):  # the supervisor has ended, too
            loop.call_soon_threadsafe(self._end, 128 - code if code < 0 else code)

    def _said(self, message: Loaded | Listening) -> None:
        if isinstance(message, Loaded):
            self._loaded.set_result(message.models)
        else:
            self._listening.set_result(None)

    def _end(self, status: int) -> None:
        self._pipe.close()
        for awaited in (self._loaded, self._listening):
            if not awaited.done():
                awaited.set_exception(MemberEnded(self.number, status))
                awaited.exception()  # nobody may wait for it
        self._ended.set_result(status)


@dataclass(frozen=True)
class Loaded:
    """A member has loaded what it could: every model's name, and whether it can be served."""

    models: dict[str, bool]


@dataclass(frozen=True)
class Listening:
    """A member has opened the port."""


class Order(Enum):
    """What the supervisor has a member do; to end, it sends SIGTERM."""

    OPEN = auto()  # the port
    RELOAD = auto()  # the callers


def enter(number: int, settings: ServerSettings, folder: Path, pipe: Connection) -> None:
    """Serve as one of several, as this process's whole life."""
    # A terminal's Ctrl-C reaches every process; the supervisor says what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _count_in(folder, number)
    configure_logging(settings.log_level, settings.log_format, number)
    spans.configure()
    from januslens_server.processes.serving import serve_among  # noqa: PLC0415 - imports metrics
    from januslens_server.serving.process import live  # noqa: PLC0415 - likewise

    live(serve_among(settings, pipe, folder))


def _count_in(folder: Path, number: int) -> None:
    """Keep every metric in files of this number: who takes another's place counts on from there."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    values.ValueClass = values.MultiProcessValue(lambda: number)  # type: ignore[no-untyped-call]  # as shipped
