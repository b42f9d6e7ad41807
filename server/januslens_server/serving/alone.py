"""A server that is one process, with ports of its own."""

from __future__ import annotations

from januslens_server import gauges
from januslens_server.config import ServerSettings
from januslens_server.serving.assembly import Assembly
from januslens_server.serving.listening import listen


async def serve(settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT, then let what runs finish within the grace.

    Raises `OSError` where a port cannot be had.
    """
    assembly = Assembly(settings)
    gauges.read_at_scrapes()
    assembly.announce()
    health_server = await listen(assembly.server, assembly.health, settings)
    assembly.load()
    await assembly.stop.wait()
    await assembly.drain()
    if health_server is not None:
        await health_server.stop(0)
