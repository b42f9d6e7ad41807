"""The standard health service: liveness, readiness, and one service name per model.

Anyone who reaches the port may call it without a token. So callers must not be able to delay other
callers or the server: statuses change without waiting for watchers, and the number of watchers is
limited.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from januslens_server import telemetry
from januslens_server.errors import ReaderStalled, RequestCancelled
from januslens_server.results import ModelState, ModelStatus
from januslens_server.rpc.call import Context, address_of
from januslens_server.rpc.options import server_options
from januslens_server.rpc.unread import write_within
from januslens_server.rpc.wire import WireFormat, serialized

ALIVE = ""
LIVE = "januslens.live"
READY = "januslens.ready"
ALL_READY = "januslens.all-ready"

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

# Maximum number of open Watch calls; a client needs one per connection and service.
MAX_WATCHES = 1000
# Seconds after which a Watch call is aborted if its caller does not read a status.
STALL_SECONDS = 60.0
# Maximum bytes of a service name, as of a model's name in requests.
MAX_NAME_BYTES = 256
# Maximum bytes of a request on the health port: a name and its framing.
MAX_REQUEST_BYTES = 1024


class Health(health_pb2_grpc.HealthServicer):
    """Answers `Check` and `Watch` from the models' states.

    Use it within one event loop. `update` and `drain` take effect at once and never wait.
    """

    def __init__(
        self, max_watches: int = MAX_WATCHES, stall_seconds: float = STALL_SECONDS
    ) -> None:
        """Allow `max_watches` open Watch calls, and half as many from one address."""
        self._max_watches = max_watches
        self._stall_seconds = stall_seconds
        self._statuses: dict[str, Any] = {ALIVE: SERVING, LIVE: SERVING}
        self._stalled = False
        self._changed = asyncio.Event()
        self._watches: Counter[str] = Counter()
        self._draining = False
        self._started = False

    def update(self, statuses: Sequence[ModelStatus]) -> bool:
        """Set the statuses from the models' states; return whether the server has become ready.

        The server is ready when every model that it started with is READY or FAILED, and at least
        one is READY. All are ready when none has failed. Models that are loaded later do not make
        the server unready meanwhile. After `drain` this method has no effect.
        """
        if self._draining:
            return False
        before = self._statuses.get(READY)
        states = {status.state for status in statuses}
        self._started = self._started or ModelState.LOADING not in states
        ready = self._started and ModelState.READY in states
        own = {
            ALIVE: True,
            LIVE: not self._stalled,
            READY: ready,
            ALL_READY: ready and ModelState.FAILED not in states,
        }
        serving = {status.name: status.state is ModelState.READY for status in statuses}
        self._statuses = {
            name: SERVING if holds else NOT_SERVING for name, holds in (serving | own).items()
        }
        telemetry.READY.set(ready)
        self._notify()
        return ready and before != SERVING

    def set_stalled(self, stalled: bool) -> None:
        """Set whether the loading of models makes no progress."""
        self._stalled = stalled
        if not self._draining:
            self._statuses[LIVE] = NOT_SERVING if stalled else SERVING
            self._notify()

    def drain(self) -> None:
        """Report NOT_SERVING for every service from now on.

        Called when the server stops, or when the device is lost, because only a new process can use
        it again.
        """
        self._draining = True
        self._statuses = dict.fromkeys(self._statuses, NOT_SERVING)
        telemetry.READY.set(0)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Return the status of one service; NOT_FOUND if it is unknown."""
        await _check_name(request.service, context)
        if request.service not in self._statuses:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=self._statuses[request.service])

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """Send the status of one service now and after every change.

        The status of an unknown service is SERVICE_UNKNOWN. The call ends with RESOURCE_EXHAUSTED
        if too many watches are open, and with ABORTED if the caller does not read.
        """
        await _check_name(request.service, context)
        try:
            with self._counted(address_of(context)):
                await self._follow(request.service, context)
        except _TooManyWatches as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except ReaderStalled:
            await context.abort(grpc.StatusCode.ABORTED, "the status was not read in time")
        except RequestCancelled:
            return  # the connection broke, so the status cannot be sent

    @contextmanager
    def _counted(self, address: str) -> Iterator[None]:
        """Count the call while it is open. Raises `_TooManyWatches` above the limits."""
        each = max(1, self._max_watches // 2)
        if self._watches.total() >= self._max_watches or self._watches[address] >= each:
            raise _TooManyWatches(
                f"too many health watches: at most {self._max_watches} may be open, {each} of "
                "them from one address; close some, or use Check"
            )
        self._watches[address] += 1
        try:
            yield
        finally:
            self._watches[address] -= 1
            if not self._watches[address]:
                del self._watches[address]

    async def _follow(self, service: str, context: Context) -> None:
        sent = None
        while True:
            changed = self._changed
            status = self._statuses.get(service, SERVICE_UNKNOWN)
            if status == sent:
                await changed.wait()
                continue
            message = serialized(health_pb2.HealthCheckResponse(status=status))
            await write_within(context, message, self._stall_seconds)
            sent = status


class _TooManyWatches(Exception):
    """More Watch calls are open than the server allows."""


async def _check_name(service: str, context: Context) -> None:
    size = len(service.encode())
    if size > MAX_NAME_BYTES:
        text = f"service name too long: expected at most {MAX_NAME_BYTES} bytes, got {size}"
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)


def build_health_server(health_service: Health) -> grpc.aio.Server:
    """Build a server with the health service only, for a plaintext port; not yet listening."""
    options = [*server_options(), ("grpc.max_receive_message_length", MAX_REQUEST_BYTES)]
    server = grpc.aio.server(interceptors=[WireFormat()], options=options)
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    return server
