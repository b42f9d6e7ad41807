"""Start the processes that share a port, aggregate their health, and replace those that end."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from januslens_server.config import ServerSettings
from januslens_server.processes import metrics
from januslens_server.processes.child import Member, MemberEnded, Order
from januslens_server.results import ModelState, ModelStatus
from januslens_server.rpc.health import Health, is_ready
from januslens_server.serving.ports import listen_for_health, listen_for_metrics, reserved
from januslens_server.serving.process import heed_signals

logger = logging.getLogger("januslens_server")


async def supervise(settings: ServerSettings) -> int:
    """Serve with several processes until SIGTERM or SIGINT; gives the exit status.

    Raises `OSError` where a port cannot be had.
    """
    with (
        reserved(settings.host, settings.port) as port,
        tempfile.TemporaryDirectory(prefix="januslens-metrics-") as folder,
    ):
        return await _supervise(settings.model_copy(update={"port": port}), Path(folder))


async def _supervise(settings: ServerSettings, folder: Path) -> int:
    health = Health()
    crew = Crew(settings, folder, health)
    crew.tell()
    stop = heed_signals(crew.reload_callers)
    listen_for_metrics(settings, metrics.registry(folder))
    health_server = await listen_for_health(health, settings)
    served = asyncio.create_task(crew.serve())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({served, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return _status(served)
    finally:
        health.drain()
        served.cancel()
        await asyncio.wait({served})  # nobody is started any more
        await crew.end()
        if health_server is not None:
            await health_server.stop(0)


def _status(served: asyncio.Task[None]) -> int:
    """0 for a signal; else what kept the processes from serving, which they have said."""
    if not served.done():
        return 0
    error = served.exception()
    if isinstance(error, MemberEnded):
        logger.critical("%s", error)
        return error.status
    served.result()
    return 1


logger = logging.getLogger("januslens_server")

# Seconds before a process is started again: twice as many after each start that came to nothing.
SOONEST, LATEST = 1.0, 60.0
# Seconds beyond the grace in which a process that drains must have ended.
LEAVING = 15.0


class Crew:
    """As many members as are configured, and what health says of them together.

    They load one after the other: each finds the memory that those before it have left, and is
    measured on cores that nobody else uses.
    """

    def __init__(self, settings: ServerSettings, folder: Path, health: Health) -> None:
        """`settings` have the port's number; the members count in `folder`."""
        self._settings = settings
        self._folder = folder
        self._health = health
        self._members: dict[int, Member] = {}
        self._models: dict[str, bool] | None = None
        self._turn = asyncio.Lock()

    async def serve(self) -> None:
        """Start all, open the port, and replace who ends, for good.

        Raises `MemberEnded` and `OSError` where not all of them can serve.
        """
        numbers = range(1, self._settings.processes + 1)
        for number in numbers:
            await self._loaded(number)
        await asyncio.gather(*(member.open() for member in self._members.values()))
        self.tell()
        where = f"{self._settings.host}:{self._settings.port}"
        logger.info("serving on %s with %d processes", where, len(numbers))
        if is_ready(self._statuses()):
            logger.info("ready")
        async with asyncio.TaskGroup() as keepers:
            for number in numbers:
                keepers.create_task(self._keep(number))

    async def _loaded(self, number: int) -> Member:
        """Start a member and wait for its models, which are those of the others."""
        member = self._members[number] = Member(number, self._settings, self._folder)
        found = await member.loaded()
        if self._models is None:
            self._models = found
        if found != self._models:
            await member.end(LEAVING)
            raise OSError(
                f"cannot serve: expected every process to serve {_said(self._models)}, got "
                f"{_said(found)} in process {number}; use fewer --processes"
            )
        return member

    async def _keep(self, number: int) -> None:
        """Replace a member whenever it ends."""
        pause = SOONEST
        while True:
            status = await self._members[number].ended()
            metrics.forget(self._folder, number)
            self.tell()
            logger.error(
                "process %d ended with status %d; it is started again in %g s",
                number,
                status,
                pause,
            )
            await asyncio.sleep(pause)
            pause = SOONEST if await self._replaced(number) else min(2 * pause, LATEST)

    async def _replaced(self, number: int) -> bool:
        """Whether the new one came to serve."""
        async with self._turn:
            try:
                member = await self._loaded(number)
                await member.open()
            except MemberEnded:
                return False
            except OSError as error:
                logger.error("%s", error)  # noqa: TRY400 - one line says it all
                return False
        self.tell()
        logger.info("process %d serves again", number)
        return True

    def tell(self) -> None:
        """Health: a model can be served while one member serves it."""
        self._health.update(self._statuses())

    def _statuses(self) -> Sequence[ModelStatus]:
        if not any(member.serves for member in self._members.values()):
            names = self._models or [model.name for model in self._settings.models]
            return [ModelStatus(name, ModelState.LOADING) for name in names]
        return [
            ModelStatus(name, ModelState.READY if ready else ModelState.FAILED)
            for name, ready in (self._models or {}).items()
        ]

    def reload_callers(self) -> None:
        """Have every member read its callers anew."""
        for member in self._members.values():
            member.order(Order.RELOAD)

    async def end(self) -> None:
        """Have all drain and end; nobody is replaced any more."""
        seconds = self._settings.grace_seconds + LEAVING
        members = list(self._members.values())
        ended = await asyncio.gather(*(member.end(seconds) for member in members))
        for member, by_itself in zip(members, ended, strict=True):
            if not by_itself:
                logger.error("process %d did not end, and was killed", member.number)


def _said(models: dict[str, bool]) -> str:
    return ", ".join(name for name, ready in models.items() if ready) or "no model"
