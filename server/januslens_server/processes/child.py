"""A child process: the supervisor's handle, the messages between them, and the entry point."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from januslens_server import spans
from januslens_server.config import Change, ModelLocation, ServerSettings, name_of
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

    def __init__(
        self,
        number: int,
        settings: ServerSettings,
        folder: Path,
        models: Sequence[ModelLocation] | None,
        receive: Callable[[Report], None],
    ) -> None:
        """Start the process; it writes its metrics to `folder`.

        It loads `models`, by default those of the settings. `receive` gets the reports that answer
        no command.
        """
        self.number = number
        self._report = receive
        self._done: dict[str, asyncio.Future[str]] = {}
        loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[Loaded] = loop.create_future()
        self._listening: asyncio.Future[None] = loop.create_future()
        self._ended: asyncio.Future[int] = loop.create_future()
        self._pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(
            target=enter, args=(number, settings, folder, theirs, models), daemon=True
        )
        self._process.start()
        theirs.close()
        threading.Thread(target=self._follow, args=(loop,), daemon=True).start()

    @property
    def serves(self) -> bool:
        """Whether the process accepts calls."""
        return self._listening.done() and not self._ended.done()

    async def loaded(self) -> Loaded:
        """Wait until all models are loaded or have failed. Raises `ChildEnded`."""
        return await asyncio.shield(self._loaded)

    async def open(self) -> None:
        """Let the process open the port, and wait until it listens. Raises `ChildEnded`."""
        self.send(Command.OPEN)
        await asyncio.shield(self._listening)

    async def apply(self, change: Change) -> str:
        """Let the process apply a change; return why it could not load the model, or nothing."""
        name = name_of(change)
        self._done[name] = asyncio.get_running_loop().create_future()
        self.send(Apply(change))
        either: set[asyncio.Future[Any]] = {self._done[name], self._ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        done = self._done.pop(name)
        return done.result() if done.done() else "the process ended while it loaded the model"

    async def ended(self) -> int:
        """Wait for the exit status of the process; 128 + N if signal N ended it."""
        return await asyncio.shield(self._ended)

    def send(self, command: Instruction) -> None:
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

    def _receive(self, message: Loaded | Listening | Applied | Report) -> None:
        match message:
            case Loaded():
                self._loaded.set_result(message)
            case Listening():
                self._listening.set_result(None)
            case Applied() if message.name in self._done:
                self._done[message.name].set_result(message.failure)
            case Asked() | Stalled() | Progress():
                self._report(message)

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
    locations: dict[str, ModelLocation]


@dataclass(frozen=True)
class Listening:
    """Message of a child: it has opened the port."""


@dataclass(frozen=True)
class Asked:
    """Message of a child: its AdminService was asked for a change, which all processes make."""

    change: Change


@dataclass(frozen=True)
class Stalled:
    """Message of a child: whether the loading of its models makes no progress."""

    number: int
    stalled: bool


@dataclass(frozen=True)
class Progress:
    """The share of loading a model that is done.

    A child sends that of its own process, and receives that of all processes.
    """

    name: str
    fraction: float


Report = Asked | Stalled | Progress


@dataclass(frozen=True)
class Applied:
    """Message of a child: it has applied a change; why it could not load the model, if so."""

    name: str
    failure: str


@dataclass(frozen=True)
class Announce:
    """Command to a child: a model will be loaded."""

    location: ModelLocation


@dataclass(frozen=True)
class Apply:
    """Command to a child: apply a change, and answer with `Applied`."""

    change: Change


@dataclass(frozen=True)
class Settle:
    """Command to a child: all processes have applied a change, or one could not load the model."""

    change: Change
    failure: str = ""


class Command(Enum):
    """Commands to a child. To end a child, the supervisor sends SIGTERM instead."""

    OPEN = auto()  # open the port
    RELOAD = auto()  # read the callers' file again


Instruction = Command | Announce | Apply | Settle | Progress


def enter(
    number: int,
    settings: ServerSettings,
    folder: Path,
    pipe: Connection,
    models: Sequence[ModelLocation] | None,
) -> None:
    """Entry point of a child process."""
    # Ctrl-C in a terminal signals every process. Ignore it here, because the supervisor handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging(settings.log_level, settings.log_format, number)
    count_in(folder, number)
    spans.configure()
    from januslens_server.processes.child_server import serve_as_child  # noqa: PLC0415 - imports metrics
    from januslens_server.serving.process import run_process  # noqa: PLC0415 - imports metrics

    run_process(serve_as_child(number, settings, pipe, folder, models))
