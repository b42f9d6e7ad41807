"""One RPC from its first byte to its status: identity, log line, metrics, span and errors."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import grpc
from google.protobuf.message import Message

from januslens_server import spans, telemetry
from januslens_server.access.callers import ANYONE, NAME, Caller
from januslens_server.errors import IntrospectionError, TryLater
from januslens_server.results import (
    Cost,
    EditPreview,
    FoundNeurons,
    GradientHeader,
    GradientSummary,
    ProjectionTable,
    StageTime,
    TraceHeader,
    TraceSummary,
)
from januslens_server.rpc.methods import SERVICE_NAME, rpc_labels
from januslens_server.rpc.status import DETAILS_KEY, code_of, milliseconds, status_of
from januslens_server.scheduling.ticket import Ticket

logger = logging.getLogger(__name__)

MessageT = TypeVar("MessageT", bound=Message)

REQUEST_ID_KEY = "x-request-id"
# After which pause gRPC is to repeat the call.
PUSHBACK_KEY = "grpc-retry-pushback-ms"
_SAFE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Call:
    """One RPC from its first byte to its status: an async context manager around its handler.

    Entering gives the call itself, with its `request_id`, its `caller` and gRPC's `context`.
    Leaving counts, times and logs it, and turns an error into the status of `rpc.status`; nothing
    is swallowed, an error always ends the call.

    A client's gRPC repeats a call that ends UNAVAILABLE, but only until it has headers. So these
    are sent once the request is admitted, `begin`, and not at all where it may be sent elsewhere.
    """

    def __init__(self, method: str, context: Context, service: str = SERVICE_NAME) -> None:
        """`method` is the RPC's name and `service` whose it is, for metrics and logs."""
        self.method = method
        self._service = service
        self._labels = rpc_labels(service, method)
        self.context = context
        self.request_id = _request_id(context)
        self.caller = caller_of(context)
        self.started = time.perf_counter()
        self._begun = False
        self._notes: dict[str, Any] = {}
        self._ticket: Ticket | None = None

    def ticket(self, cost: Cost) -> Ticket:
        """What the call's request carries through the device's queue."""
        self._ticket = Ticket(self.context.time_remaining(), self.caller, cost)
        return self._ticket

    def note(self, **facts: Any) -> None:
        """What the call's line in the log is to say beside id, caller, status and times."""
        self._notes.update(facts)

    def sent(self, size: int) -> None:
        """A message of so many bytes went out."""
        self._notes["messages"] = self._notes.get("messages", 0) + 1
        self._notes["bytes"] = self._notes.get("bytes", 0) + size

    def answered(self, message: MessageT) -> MessageT:
        """The call's only message, on its way out."""
        self.sent(message.ByteSize())
        return message

    async def __aenter__(self) -> Self:
        telemetry.STARTED.labels(*self._labels).inc()
        metadata = self.context.invocation_metadata() or ()
        self._span = spans.start_span(self._service, self.method, metadata)
        return self

    async def begin(self) -> None:
        """Send the headers: from now on nobody repeats the call by itself."""
        if not self._begun:
            self._begun = True
            await self.context.send_initial_metadata(((REQUEST_ID_KEY, self.request_id),))

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if error is None:
            await self.begin()
            self._end(grpc.StatusCode.OK)
        elif isinstance(error, Exception):
            await self._abort(error)
        else:  # asyncio's cancellation: the caller is gone, there is no one to answer
            late = self.context.time_remaining() == 0
            self._end(grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED)

    async def _abort(self, error: Exception) -> NoReturn:
        if isinstance(error, IntrospectionError):
            telemetry.REJECTED.labels(error.reason).inc()
            self.note(reason=error.reason)
        else:
            logger.error("request %s met a bug", self.request_id, exc_info=error)
        status = status_of(error, self.request_id)
        code = code_of(status)
        self._end(code)
        trailers: list[tuple[str, str | bytes]] = [(DETAILS_KEY, status.SerializeToString())]
        if code is not grpc.StatusCode.UNAVAILABLE:
            await self.begin()
        else:
            trailers.append((REQUEST_ID_KEY, self.request_id))
            if isinstance(error, TryLater):
                trailers.append((PUSHBACK_KEY, str(milliseconds(error.retry_after))))
        await self.context.abort(code, status.message, trailing_metadata=tuple(trailers))

    def _end(self, code: grpc.StatusCode) -> None:
        seconds = time.perf_counter() - self.started
        telemetry.HANDLED.labels(*self._labels, code.name).inc()
        telemetry.HANDLING_SECONDS.labels(*self._labels).observe(seconds)
        line = self._line(code, seconds)
        spans.end_span(self._span, code.name, code.value[0], line)
        logger.info("%s %s", self.method, code.name, extra=line)

    def _line(self, code: grpc.StatusCode, seconds: float) -> dict[str, Any]:
        line = {
            "id": self.request_id,
            "caller": self.caller,
            "method": self.method,
            "status": code.name,
            "seconds": seconds,
        }
        if self._ticket is not None:
            line |= {"queue_seconds": self._ticket.waited, "device_seconds": self._ticket.spent}
        return line | self._notes


def _request_id(context: Context) -> str:
    """The caller's id if it is safe to echo and log, else a fresh one."""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _SAFE_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex


Context = grpc.aio.ServicerContext[Any, Any]

UNKNOWN = "unknown"

_ASKING: ContextVar[Caller] = ContextVar("asking", default=ANYONE)


def asking() -> Caller:
    """The caller of the RPC that is being handled."""
    return _ASKING.get()


def asked_by(caller: Caller) -> None:
    """From now on this task handles an RPC of `caller`."""
    _ASKING.set(caller)


def caller_of(context: Context) -> str:
    """The name under which a call is logged, and between which the device is shared fairly.

    It is that of the caller's token, else that in its certificate; callers without either are told
    apart by the address that they come from, without port.
    """
    return asking().name or _certified(context) or address_of(context)


def _certified(context: Context) -> str | None:
    """The common name of a certificate that an authority of ours has signed."""
    for name in (context.auth_context() or {}).get("x509_common_name", ()):
        if NAME.fullmatch(name.decode(errors="replace")):
            return name.decode()
    return None


def address_of(context: Context) -> str:
    """The address that a call comes from, without its port."""
    transport, _, address = (context.peer() or "").partition(":")
    if transport == "ipv4":
        return address.rpartition(":")[0]
    if transport == "ipv6":
        host = address.rpartition(":")[0].replace("%5B", "[").replace("%5D", "]")
        return host.strip("[]")
    return transport or UNKNOWN


# Of answers of one message.
_OF_ONE: tuple[tuple[type, str, Callable[[Any], int]], ...] = (
    (EditPreview, "prompts", lambda preview: 1 + len(preview.probes)),
    (FoundNeurons, "neurons", lambda found: len(found.neurons)),
    (ProjectionTable, "vectors", lambda table: len(table.projected)),
)


def sizes_of(result: object) -> dict[str, Any]:
    """The sizes that this result tells, and the seconds by stage; of most results nothing."""
    if isinstance(result, TraceHeader | GradientHeader):
        return {"tokens": len(result.prompt_tokens)}
    if isinstance(result, TraceSummary):
        return {"nodes": result.nodes, "edges": result.edges, "stages": _stages(result.times)}
    if isinstance(result, GradientSummary):
        return {"matrices": result.matrices, "stages": _stages(result.times)}
    return {name: size(result) for kind, name, size in _OF_ONE if isinstance(result, kind)}


def _stages(times: Sequence[StageTime]) -> dict[str, float]:
    return {time.stage: round(time.seconds, 6) for time in times}
