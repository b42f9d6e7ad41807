"""A child process: the supervisor's handle, the messages between them, and the entry point."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import threading
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from multiprocessing.connection import Connection
from pathlib import Path

from januslens_server import spans
from januslens_server.config import ServerSettings
from januslens_server.logs import configure_logging
from januslens_server.processes.metric_files import count_in

# Start new interpreters, because the threads of gRPC and torch do not survive a fork.
CONTEXT = multiprocessing.get_context("spawn")


class ChildEnded(Exception):
    """A child process ended before it accepted calls."""

    def __init__(self, number: int, status: int) -> None:
        """`status` is the exit status of the process; 128 + N if signal N ended it."""
        super().__init__(f"process {number} ended with status {status} before it served")
        self.status = status


class ChildProcess:
    """The supervisor's handle on a started process."""

    def __init__(self, number: int, settings: ServerSettings, folder: Path) -> None:
        """Start the process; it writes its metrics to `folder`."""
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
        """Whether the process accepts calls."""
        return self._listening.done() and not self._ended.done()

    async def loaded(self) -> dict[str, bool]:
        """Wait until all models are loaded; return whether each is ready. Raises `ChildEnded`."""
        return await asyncio.shield(self._loaded)

    async def open(self) -> None:
        """Let the process open the port, and wait until it listens. Raises `ChildEnded`."""
        self.send(Command.OPEN)
        await asyncio.shield(self._listening)

    async def ended(self) -> int:
        """Wait for the exit status of the process; 128 + N if signal N ended it."""
        return await asyncio.shield(self._ended)

    def send(self, command: Command) -> None:
        """Send a command, unless the process has ended."""
        with suppress(OSError):
            self._pipe.send(command)

    async def end(self, seconds: float) -> bool:
        """Send SIGTERM, and after `seconds` SIGKILL; return whether SIGTERM was enough."""
        self._process.terminate()
        try:
            await asyncio.wait_for(self.ended(), seconds)
        except TimeoutError:
            self._process.kill()
            await self.ended()
            return False
        return True

    def _follow(self, loop: asyncio.AbstractEventLoop) -> None:
        """Receive messages until the process ends; runs in a thread."""
        with suppress(EOFError, OSError):
            while True:
                loop.call_soon_threadsafe(self._receive, self._pipe.recv())
        self._process.join()
        code = self._process.exitcode or 0
        with suppress(RuntimeError):  # the supervisor has ended as well
            loop.call_soon_threadsafe(self._end, 128 - code if code < 0 else code)

    def _receive(self, message: Loaded | Listening) -> None:
        if isinstance(message, Loaded):
            self._loaded.set_result(message.models)
        else:
            self._listening.set_result(None)

    def _end(self, status: int) -> None:
        self._pipe.close()
        for awaited in (self._loaded, self._listening):
            if not awaited.done():
                awaited.set_exception(ChildEnded(self.number, status))
                awaited.exception()  # marks the exception as retrieved, even if nothing awaits it
        self._ended.set_result(status)


@dataclass(frozen=True)
class Loaded:
    """Message of a child: its models are loaded; `models` says whether each is ready."""

    models: dict[str, bool]


@dataclass(frozen=True)
class Listening:
    """Message of a child: it has opened the port."""


class Command(Enum):
    """Commands to a child. To end a child, the supervisor sends SIGTERM instead."""

    OPEN = auto()  # open the port
    RELOAD = auto()  # read the callers' file again


def enter(number: int, settings: ServerSettings, folder: Path, pipe: Connection) -> None:
    """Entry point of a child process."""
    # Ctrl-C in a terminal signals every process. Ignore it here, because the supervisor handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging(settings.log_level, settings.log_format, number)
    count_in(folder, number)
    spans.configure()
    from januslens_server.processes.child_server import serve_as_child  # noqa: PLC0415 - imports metrics
    from januslens_server.serving.process import run_process  # noqa: PLC0415 - imports metrics

    run_process(serve_as_child(settings, pipe, folder))
