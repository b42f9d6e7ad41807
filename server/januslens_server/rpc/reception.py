"""Receive requests within bounds on memory, however slowly their peers send them.

When a handler reads a call's message, gRPC's core collects it in memory, up to 4 MiB per call. So
`Receptions` decides when messages are read. Few requests are received and prepared at once: a
request keeps its place until it is parsed, tokenized and admitted. A peer that stops in the middle
of a message loses its place. A waiting call uses no more memory than its HTTP/2 window,
because `rpc.options` keeps core from enlarging windows. Health checks do not wait, because they are
small; each must arrive within one second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack

import grpc

from januslens_server.errors import QueueFull, RequestStalled
from januslens_server.rpc.call import Context
from januslens_server.rpc.places import FairPlaces, PlacesByName, hold_places

# Maximum number of requests that are received and prepared at once: in total, and of one caller.
AT_ONCE, OF_ONE_CALLER = 16, 8
# Maximum number of calls that wait to be received: in total, and of one caller. gRPC's core stores
# up to 64 KiB of each.
WAITING, WAITING_OF_ONE_CALLER = 4000, 1000
# Seconds within which a message must arrive if other calls wait for its place, and if none do.
SHORT_SECONDS, LONG_SECONDS = 2.0, 20.0
# Seconds within which a health check must arrive.
HEALTH_SECONDS = 1.0


async def receive_health_check(context: Context) -> bytes | None:
    """Receive the message of a health check, without waiting for other calls.

    Returns None if the peer ended the call without one. Raises `RequestStalled` if the message is
    not complete in time.
    """
    return await _read(context, HEALTH_SECONDS, HEALTH_SECONDS, lambda: False)


class Receptions:
    """The requests that a server is receiving and preparing, apart from health checks."""

    def __init__(self) -> None:
        """Start with no request being received."""
        self._places = FairPlaces(AT_ONCE)
        self._callers = PlacesByName(OF_ONE_CALLER)
        self._calls = 0

    async def receive(self, context: Context, caller: str, held: ExitStack) -> bytes | None:
        """Receive the one message of a call; None if the peer ended the call without one.

        The call keeps its place until `held` is closed, or `leave_places` is called in its task.

        Raises `QueueFull` if too many calls wait to be received, and `RequestStalled` if the
        message is not complete in time.
        """
        own = self._callers.of(caller, held)
        if own.waiting >= WAITING_OF_ONE_CALLER or self._calls >= AT_ONCE + WAITING:
            raise QueueFull("too many requests are waiting to be received; try again", 1.0)
        self._calls += 1
        held.callback(self._leave)
        await own.take(held)
        await self._places.take(caller, held)
        hold_places(caller, held)
        return await _read(
            context,
            SHORT_SECONDS,
            LONG_SECONDS,
            lambda: own.waiting > 0 or self._places.waiting > 0,
        )

    def _leave(self) -> None:
        self._calls -= 1


async def _read(
    context: Context, step: float, longest: float, wanted: Callable[[], bool]
) -> bytes | None:
    """Read one message within `longest` seconds; every `step`, give up if the place is `wanted`."""
    reading = asyncio.ensure_future(context.read())
    seconds = 0.0
    try:
        while not reading.done():
            if seconds >= longest or (seconds > 0 and wanted()):
                raise RequestStalled(
                    f"the request was not received within {seconds:g} s; send it faster"
                )
            await asyncio.wait({reading}, timeout=step)
            seconds += step
    finally:
        reading.cancel()  # has no effect on a finished read
        reading.add_done_callback(_forget)
    message = reading.result()
    return None if message is grpc.aio.EOF else message


def _forget(reading: asyncio.Future[bytes]) -> None:
    """Retrieve the result of an abandoned read, so that asyncio does not report its exception."""
    if not reading.cancelled():
        reading.exception()
