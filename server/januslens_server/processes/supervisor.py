"""Starts the processes that serve one port, answers for them, and replaces who ends."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from pathlib import Path

from januslens_server.config import ServerSettings
from januslens_server.processes import metrics
from januslens_server.processes.crew import Crew
from januslens_server.processes.member import MemberEnded
from januslens_server.rpc.health import Health
from januslens_server.serving.listening import listen_for_health, listen_for_metrics
from januslens_server.serving.ports import reserved
from januslens_server.serving.signals import heed_signals

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
