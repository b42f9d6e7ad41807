"""Start processes that share a port, combine their health, and replace processes that end."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from januslens_server.config import Change, Load, ModelLocation, ServerSettings, name_of
from januslens_server.processes import metrics
from januslens_server.processes.child import (
    Announce,
    Asked,
    ChildEnded,
    ChildProcess,
    Command,
    Progress,
    Report,
    Settle,
    Stalled,
)
from januslens_server.results import ModelState, ModelStatus
from januslens_server.rpc.health import Health
from januslens_server.serving.ports import listen_for_health, listen_for_metrics, reserve_port
from januslens_server.serving.process import handle_signals

logger = logging.getLogger("januslens_server")


# Seconds before a process that has ended is started again; doubled after each failed start.
MIN_RESTART_DELAY, MAX_RESTART_DELAY = 1.0, 60.0
# Seconds from the end of the grace period until a draining process is killed.
KILL_AFTER = 15.0


async def supervise(settings: ServerSettings) -> int:
    """Serve with several processes until SIGTERM or SIGINT; return the exit status.

    Raises `OSError` if a port is not available.
    """
    with (
        reserve_port(settings.host, settings.port) as port,
        tempfile.TemporaryDirectory(prefix="januslens-metrics-") as folder,
    ):
        return await _supervise(settings.model_copy(update={"port": port}), Path(folder))


async def _supervise(settings: ServerSettings, folder: Path) -> int:
    health = Health(settings.max_watches)
    group = ProcessGroup(settings, folder, health)
    group.update_health()
    stop = handle_signals(group.reload_callers)
    listen_for_metrics(settings, metrics.registry(folder))
    health_server = await listen_for_health(health, settings)
    served = asyncio.create_task(group.serve())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({served, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return _status(served)
    finally:
        health.drain()
        served.cancel()
        await asyncio.wait({served})  # after this, no process is started
        await group.end()
        if health_server is not None:
            await health_server.stop(0)


def _status(served: asyncio.Task[None]) -> int:
    """Return 0 after a signal, else the status of the process that could not serve."""
    if not served.done():
        return 0
    error = served.exception()
    if isinstance(error, ChildEnded):
        logger.critical("%s", error)
        return error.status
    served.result()
    return 1


class ProcessGroup:
    """The configured number of child processes, and their combined health.

    The processes load one after another, so that each sees the memory that the others have left,
    and its pace is measured on idle cores.
    """

    def __init__(self, settings: ServerSettings, folder: Path, health: Health) -> None:
        """`settings` has the reserved port; the processes write metrics to `folder`."""
        self._settings = settings
        self._folder = folder
        self._health = health
        self._children: dict[int, ChildProcess] = {}
        # What a process loads when it starts; None = the models of the settings.
        self._locations: dict[str, ModelLocation] | None = None
        self._models: dict[str, bool] = {}  # whether each is served
        # Why models could not be loaded at run time, which a replacement does not try again.
        self._failures: dict[str, str] = {}
        self._loading_in: tuple[int, int] = (0, 1)  # processes that have loaded, and all
        self._stalled: set[int] = set()
        self._starting = asyncio.Lock()  # held while a process starts or the models change
        self._changing: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Start all processes and open the port, then replace processes that end, forever.

        Raises `ChildEnded` or `OSError` if a process cannot serve at the start.
        """
        numbers = range(1, self._settings.processes + 1)
        for number in numbers:
            await self._loaded(number)
        await asyncio.gather(*(child.open() for child in self._children.values()))
        ready = self.update_health()
        where = f"{self._settings.host}:{self._settings.port}"
        logger.info(
            "serving on %s with %d processes", where, len(numbers), extra={"address": where}
        )
        if ready:
            logger.info("ready")
        async with asyncio.TaskGroup() as keepers:
            for number in numbers:
                keepers.create_task(self._keep(number))

    async def _loaded(self, number: int) -> ChildProcess:
        """Start a process and wait for its models, which must be those of the other processes."""
        locations, failed = None, []
        if self._locations is not None:
            failed = [self._locations[name] for name in self._failures]
            locations = [model for model in self._locations.values() if model not in failed]
        child = self._children[number] = ChildProcess(
            number, self._settings, self._folder, locations, self._receive
        )
        loaded = await child.loaded()
        found = loaded.models
        if self._locations is None:
            self._models, self._locations = found, loaded.locations
        for model in failed:
            found[model.name] = False
            child.send(Announce(model))
            child.send(Settle(Load(model), self._failures[model.name]))
        if found != self._models:
            await child.end(KILL_AFTER)
            raise OSError(
                f"cannot serve: process {number} loaded {_names(found)}, but the other processes "
                f"loaded {_names(self._models)}; use fewer --processes"
            )
        return child

    async def _keep(self, number: int) -> None:
        """Replace a process whenever it ends."""
        pause = MIN_RESTART_DELAY
        while True:
            status = await self._children[number].ended()
            metrics.forget(self._folder, number)
            self._set_stalled(number, stalled=False)
            self.update_health()
            logger.error(
                "process %d ended with status %d; restarting it in %g s",
                number,
                status,
                pause,
            )
            await asyncio.sleep(pause)
            pause = (
                MIN_RESTART_DELAY
                if await self._replaced(number)
                else min(2 * pause, MAX_RESTART_DELAY)
            )

    async def _replaced(self, number: int) -> bool:
        """Start a replacement; return whether it serves."""
        async with self._starting:
            try:
                child = await self._loaded(number)
                await child.open()
            except ChildEnded:
                return False
            except OSError as error:
                logger.error("%s", error)  # noqa: TRY400 - the message is enough
                return False
        self.update_health()
        logger.info("process %d serves again", number)
        return True

    def _receive(self, report: Report) -> None:
        """Receive what a process reports of itself."""
        match report:
            case Asked():
                task = asyncio.create_task(self._change(report.change))
                self._changing.add(task)
                task.add_done_callback(self._changing.discard)
            case Progress():
                loaded, count = self._loading_in
                fraction = (loaded + report.fraction) / count
                for child in self._children.values():
                    child.send(Progress(report.name, fraction))
            case Stalled():
                self._set_stalled(report.number, stalled=report.stalled)

    def _set_stalled(self, number: int, *, stalled: bool) -> None:
        (self._stalled.add if stalled else self._stalled.discard)(number)
        self._health.set_stalled(bool(self._stalled))

    async def _change(self, change: Change) -> None:
        """Make all processes apply a change of the models.

        A process that starts meanwhile waits, and then loads the changed models.
        """
        async with self._starting:
            if self._locations is None:
                return  # a process that serves has set them
            name, failure = name_of(change), ""
            children = [child for child in self._children.values() if child.serves]
            if isinstance(change, Load):
                if self._models.get(name, False):
                    return  # another process was asked for a model of this name before
                self._failures.pop(name, None)
                failure = await self._load(change, children)
                self._locations[name], self._models[name] = change.location, not failure
                if failure:
                    self._failures[name] = failure
            else:
                await asyncio.gather(*(child.apply(change) for child in children))
                for entries in (self._locations, self._models, self._failures):
                    entries.pop(name, None)
            for child in children:
                child.send(Settle(change, failure))
        self.update_health()

    async def _load(self, change: Load, children: Sequence[ChildProcess]) -> str:
        """Let processes load a model one after another, so that each sees the memory that is left.

        Returns why a process could not, after which no other one tries; empty if all have loaded.
        """
        for child in children:
            child.send(Announce(change.location))
        for loaded, child in enumerate(children):
            if not child.serves:
                continue  # it has ended; its replacement loads the model
            self._loading_in = loaded, len(children)
            failure = await child.apply(change)
            if failure and loaded:
                failure = f"process {child.number} could not load it: {failure}"
            if failure:
                return failure
        return ""

    def update_health(self) -> bool:
        """Report a model as SERVING while at least one process serves it.

        Returns whether the server has become ready.
        """
        return self._health.update(self._statuses())

    def _statuses(self) -> Sequence[ModelStatus]:
        if not any(child.serves for child in self._children.values()):
            names = self._models or [model.name for model in self._settings.models]
            return [ModelStatus(name, ModelState.LOADING) for name in names]
        return [
            ModelStatus(name, ModelState.READY if ready else ModelState.FAILED)
            for name, ready in self._models.items()
        ]

    def reload_callers(self) -> None:
        """Make every process read the callers' file again."""
        for child in self._children.values():
            child.send(Command.RELOAD)

    async def end(self) -> None:
        """Drain and end all processes."""
        seconds = self._settings.grace_seconds + KILL_AFTER
        children = list(self._children.values())
        ended = await asyncio.gather(*(child.end(seconds) for child in children))
        for child, by_itself in zip(children, ended, strict=True):
            if not by_itself:
                logger.error("process %d did not end in time and was killed", child.number)


def _names(models: dict[str, bool]) -> str:
    return ", ".join(name for name, ready in models.items() if ready) or "no model"
