"""One of the processes, as the supervisor sees it."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from contextlib import suppress
from pathlib import Path

from januslens_server.config import ServerSettings
from januslens_server.processes.entry import enter
from januslens_server.processes.messages import Listening, Loaded, Order

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
