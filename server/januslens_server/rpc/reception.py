"""Receive requests within bounds on memory, however slowly their peers send them.

gRPC's core collects a message in memory as soon as something asks for it, up to 4 MiB for each open
call. `Receptions` decides when to ask: few messages are collected at once, a peer that stops in the
middle of one loses its place, and a call that waits holds no more than its HTTP/2 window, since
`rpc.options` keeps core from enlarging windows on its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from januslens_server.errors import QueueFull, RequestStalled
from januslens_server.rpc.call import Context

# Messages that are collected at once: in all, and for one caller.
AT_ONCE, OF_ONE_CALLER = 16, 8
# Calls of one caller that may wait for a place.
WAITING = 256
# Seconds that a message may take while other calls wait for a place, and if none do.
SHORT_SECONDS, LONG_SECONDS = 2.0, 20.0


class Receptions:
    """The messages that a server is receiving."""

    def __init__(self) -> None:
        """Nothing is being received."""
        self._places = asyncio.Semaphore(AT_ONCE)
        self._callers: dict[str, _CallerPlaces] = {}
        self._waiting = 0

    async def receive(self, context: Context, caller: str) -> bytes | None:
        """Receive the one message of a call; None if the peer ended the call without one.

        Raises `QueueFull` if too many calls of the caller wait to be received, and `RequestStalled`
        if the message is not complete in time.
        """
        async with self._place(caller):
            reading = asyncio.ensure_future(context.read())
            try:
                await self._completed(reading)
            finally:
                reading.cancel()  # without effect on one that is finished
                reading.add_done_callback(_forget)
        message = reading.result()
        return None if message is grpc.aio.EOF else message

    @asynccontextmanager
    async def _place(self, caller: str) -> AsyncIterator[None]:
        own = self._callers.setdefault(caller, _CallerPlaces())
        if own.waiting >= WAITING:
            raise QueueFull(
                f"{WAITING} requests of this caller are waiting to be received; try again", 1.0
            )
        own.calls += 1
        own.waiting += 1
        self._waiting += 1
        arrived = False
        try:
            async with own.places, self._places:
                arrived = True
                own.waiting -= 1
                self._waiting -= 1
                yield
        finally:
            if not arrived:
                own.waiting -= 1
                self._waiting -= 1
            own.calls -= 1
            if not own.calls:
                del self._callers[caller]

    async def _completed(self, reading: asyncio.Future[bytes]) -> None:
        """Wait until the message is complete."""
        seconds = 0.0
        while seconds < LONG_SECONDS:
            finished, _ = await asyncio.wait({reading}, timeout=SHORT_SECONDS)
            if finished:
                return
            seconds += SHORT_SECONDS
            if self._waiting:
                break
        raise RequestStalled(f"the request was not received within {seconds:g} s; send it faster")


class _CallerPlaces:
    """The places of one caller; `calls` hold one or wait, `waiting` of them wait."""

    def __init__(self) -> None:
        self.places = asyncio.Semaphore(OF_ONE_CALLER)
        self.calls = 0
        self.waiting = 0


def _forget(reading: asyncio.Future[bytes]) -> None:
    """Retrieve the result of an abandoned read, so that asyncio does not report its exception."""
    if not reading.cancelled():
        reading.exception()
