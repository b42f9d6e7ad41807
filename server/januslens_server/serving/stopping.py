"""The end of serving: by a lost device, or drained."""

from __future__ import annotations

import asyncio
import io
import logging
import sys
from collections.abc import Callable

import grpc

from januslens_server.rpc.health import Health
from januslens_server.rpc.streaming import DeviceStreams

logger = logging.getLogger("januslens_server")


def on_device_lost(
    health: Health, loop: asyncio.AbstractEventLoop, lost: asyncio.Event
) -> Callable[[], None]:
    """What the device's thread calls; `lost` is set, and whoever started the process replaces it.

    Until then every health answer says NOT_SERVING, for orchestrators.
    """

    def tell() -> None:
        logger.critical("the device computes no more: nothing is served until a new start")
        loop.call_soon_threadsafe(health.drain)
        loop.call_soon_threadsafe(lost.set)

    return tell


async def finish(server: grpc.aio.Server, streams: DeviceStreams, grace: float) -> None:
    """Let what runs be computed and read, for `grace` seconds, then stop.

    We count our own requests: `stop(grace)` would wait for every open health watch.
    """
    logger.info("draining %d requests, for at most %g s", streams.unfinished, grace)
    finished = await streams.wait_finished(grace)
    logger.info("drained" if finished else "grace expired, cutting what still runs")
    # gRPC logs and prints a traceback for every call that it cuts, an open health watch too; the
    # log keeps the stream that it has.
    logging.getLogger("grpc").setLevel(logging.CRITICAL)
    sys.stderr = io.StringIO()
    # The last statuses are on their way to their readers.
    await server.stop(1.0 if finished else 0.0)
