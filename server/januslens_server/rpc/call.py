"""One RPC from start to status: its id and caller, log line, metrics and span."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import grpc

from januslens.v1 import admin_pb2, service_pb2
from januslens_server import spans, telemetry
from januslens_server.access.callers import ANYONE, NAME, Caller
from januslens_server.errors import IntrospectionError, TryLater
from januslens_server.results import (
    ActivationsHeader,
    ActivationsSummary,
    Cost,
    EditPreview,
    FoundNeurons,
    GenerationHeader,
    GenerationSummary,
    GradientHeader,
    GradientSummary,
    InterveneHeader,
    InterveneSummary,
    ProjectionTable,
    StageTime,
    TraceHeader,
    TraceSummary,
)
from januslens_server.rpc.places import leave_places
from januslens_server.rpc.status import STATUS, milliseconds, status_of
from januslens_server.rpc.usage import USAGE, Use
from januslens_server.scheduling.job import QueuedRequest

logger = logging.getLogger(__name__)

SERVICE = service_pb2.DESCRIPTOR.services_by_name["IntrospectionService"]
SERVICE_NAME = SERVICE.full_name
RPCS = tuple(method.name for method in SERVICE.methods)
ADMIN = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]
ADMIN_NAME = ADMIN.full_name
ADMIN_RPCS = tuple(method.name for method in ADMIN.methods)
# Both services of this project, by name.
SERVICES = {service.full_name: service for service in (SERVICE, ADMIN)}

Serializer = Callable[[Any], bytes]
HeldT = TypeVar("HeldT")

_STREAMS = {method.name for method in SERVICE.methods if method.server_streaming}

Context = grpc.aio.ServicerContext[Any, Any]

REQUEST_ID_KEY = "x-request-id"
# Metadata key: milliseconds after which a client's gRPC may repeat the call.
PUSHBACK_KEY = "grpc-retry-pushback-ms"
# Metadata key: with the value `true`, a stream reports the request's place while it waits.
REPORT_WAITING_KEY = "x-report-waiting"
# The name of a caller without token, certificate and address.
UNKNOWN = "unknown"
# A client's timer runs out before the server's by the time that the request took to arrive.
DEADLINE_MARGIN = 0.1
# Seconds for which a handler waits until its error is sent. It is sent after the messages that the
# caller has not read yet, which may be never.
ERROR_SECONDS = 1.0

_SAFE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_CURRENT_CALLER: ContextVar[Caller] = ContextVar("current_caller", default=ANYONE)


class Call:
    """One RPC, as an async context manager around its handler.

    On exit the call is counted, timed and logged. An exception ends the call with the status that
    `rpc.status` maps it to.

    A client's gRPC repeats calls that end with UNAVAILABLE, but only until it has received headers.
    So headers are sent when the request is admitted, and they are not sent with UNAVAILABLE.
    """

    def __init__(self, method: str, context: Context, service: str = SERVICE_NAME) -> None:
        """`service` and `method` are the RPC's names, for metrics and logs."""
        self.method = method
        self._service = service
        self._labels = rpc_labels(service, method)
        self.context = context
        self.request_id = _request_id(context)
        self.caller = caller_name(context)
        self.started = time.perf_counter()
        self._headers_sent = False
        self._notes: dict[str, Any] = {}
        self._queued: QueuedRequest | None = None
        self._held = ExitStack()
        self._model = ("", "")  # name and level

    async def __aenter__(self) -> Self:
        telemetry.STARTED.labels(*self._labels).inc()
        metadata = self.context.invocation_metadata() or ()
        self._span = spans.start_span(self._service, self.method, metadata)
        return self

    def queued_request(self, cost: Cost) -> QueuedRequest:
        """Create the record of this call's request in the device's queue."""
        self._queued = QueuedRequest(self.context.time_remaining(), self.caller, cost)
        return self._queued

    @property
    def queued(self) -> QueuedRequest:
        """The record that `queued_request` created. Raises `LookupError` before that."""
        if self._queued is None:
            raise LookupError("the request is not in the queue; call queued_request first")
        return self._queued

    @property
    def reports_waiting(self) -> bool:
        """Whether the caller asked for messages while the request waits for the device."""
        wanted = (REPORT_WAITING_KEY, "true")
        return self.method in _STREAMS and wanted in (self.context.invocation_metadata() or ())

    def hold(self, resource: AbstractContextManager[HeldT]) -> HeldT:
        """Enter a context that is left when the call ends."""
        return self._held.enter_context(resource)

    def serve(self, model: str, level: str) -> None:
        """Set the model of the call and its level, the lowest of its layers, for counting."""
        self._model = model, level

    def note(self, **fields: Any) -> None:
        """Add fields to the call's log line."""
        self._notes.update(fields)

    async def send_headers(self) -> None:
        """Send the initial metadata, once; clients do not repeat the call after that."""
        if not self._headers_sent:
            self._headers_sent = True
            with _broken_connection_cancels():
                await self.context.send_initial_metadata(((REQUEST_ID_KEY, self.request_id),))

    def sent(self, size: int) -> None:
        """Count a sent message of `size` bytes, for the log line."""
        self._notes["messages"] = self._notes.get("messages", 0) + 1
        self._notes["bytes"] = self._notes.get("bytes", 0) + size

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        leave_places()
        self._count_use()  # before the model may be unloaded, which removes its series
        self._held.close()
        if error is None:
            await self.send_headers()
            self._end(grpc.StatusCode.OK)
        elif isinstance(error, Exception):
            await self._abort(error)
        else:  # asyncio cancelled the handler because the caller has disconnected
            self._end(code_of_cancellation(self.context.time_remaining()))

    async def _abort(self, error: Exception) -> NoReturn:
        if isinstance(error, IntrospectionError):
            telemetry.REJECTED.labels(error.reason).inc()
            self.note(reason=error.reason)
        else:
            logger.error("internal error in request %s", self.request_id, exc_info=error)
        status = status_of(error, self.request_id)
        self._end(status.code)
        trailers: list[tuple[str, str | bytes]] = [*status.trailing_metadata]
        if status.code is not grpc.StatusCode.UNAVAILABLE:
            await self.send_headers()
        else:
            trailers.append((REQUEST_ID_KEY, self.request_id))
            if isinstance(error, TryLater):
                trailers.append((PUSHBACK_KEY, str(milliseconds(error.retry_after))))
        await self._send_error(status.code, status.details, tuple(trailers))

    async def _send_error(
        self, code: grpc.StatusCode, details: str, trailers: tuple[tuple[str, str | bytes], ...]
    ) -> NoReturn:
        """End the call, and the handler even if the caller does not read the status.

        A handler that waited for such a caller would keep its model, request and results in memory
        for as long as the connection is open. gRPC still sends the status when the caller reads.
        """
        sending: asyncio.Future[NoReturn] = asyncio.ensure_future(
            self.context.abort(code, details, trailing_metadata=trailers)
        )
        sending.add_done_callback(retrieve_error)
        sent, _ = await asyncio.wait([sending], timeout=ERROR_SECONDS)
        if not sent:
            raise asyncio.CancelledError("the caller does not read the status")
        with _broken_connection_cancels():
            sending.result()  # raises gRPC's own exception, which ends the handler

    def _end(self, code: grpc.StatusCode) -> None:
        seconds = time.perf_counter() - self.started
        telemetry.HANDLED.labels(*self._labels, code.name).inc()
        telemetry.HANDLING_SECONDS.labels(*self._labels).observe(seconds)
        fields = self._log_fields(code, seconds)
        spans.end_span(self._span, code.name, code.value[0], fields)
        logger.info("%s %s", self.method, code.name, extra=fields)

    def _count_use(self) -> None:
        """Count the call for its model and its caller.

        Metrics have the callers of the callers' file only.
        """
        sizes = {name: self._notes.get(name, 0) for name in ("tokens", "generated", "experiments")}
        seconds = 0.0 if self._queued is None else self._queued.spent
        caller, (model, level) = current_caller().name, self._model
        USAGE.add(caller, (self.method, model, level), Use(1, seconds, **sizes))
        if model:
            telemetry.MODEL_REQUESTS.labels(self.method, model, level).inc()
            telemetry.EXPERIMENTS.labels(model).inc(sizes["experiments"])
        if caller:
            telemetry.CALLER_DEVICE_SECONDS.labels(caller, self.method).inc(seconds)
            telemetry.CALLER_TOKENS.labels(caller, self.method).inc(sizes["tokens"])
            telemetry.CALLER_REQUESTS.labels(
                caller, self.method
            ).inc()  # last: completes the others

    def _log_fields(self, code: grpc.StatusCode, seconds: float) -> dict[str, Any]:
        fields = {
            "id": self.request_id,
            "caller": self.caller,
            "method": self.method,
            "status": code.name,
            "seconds": seconds,
        }
        if self._span is not None:
            fields["trace_id"] = spans.trace_id(self._span)
        if self._queued is not None:
            fields |= {"queue_seconds": self._queued.waited, "device_seconds": self._queued.spent}
        return fields | self._notes


def _request_id(context: Context) -> str:
    """Return the caller's request id if it is safe to log, else a new one."""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _SAFE_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex


def caller_name(context: Context) -> str:
    """Return the caller's name, for logs and for sharing the device fairly.

    It is the name of the token's caller, else the common name in the client certificate, else the
    address without port.
    """
    return current_caller().name or _certificate_name(context) or address_of(context)


def _certificate_name(context: Context) -> str | None:
    """Return the common name of the verified client certificate, if it is safe to log."""
    for name in (context.auth_context() or {}).get("x509_common_name", ()):
        if NAME.fullmatch(name.decode(errors="replace")):
            return name.decode()
    return None


def address_of(context: Context) -> str:
    """Return the address of the caller, without its port."""
    transport, _, address = (context.peer() or "").partition(":")
    if transport == "ipv4":
        return address.rpartition(":")[0]
    if transport == "ipv6":
        host = address.rpartition(":")[0].replace("%5B", "[").replace("%5D", "]")
        return host.strip("[]")
    return transport or UNKNOWN


def current_caller() -> Caller:
    """Return the authenticated caller of the RPC that this task handles."""
    return _CURRENT_CALLER.get()


def set_current_caller(caller: Caller) -> None:
    """Set the caller of the RPC that this task handles."""
    _CURRENT_CALLER.set(caller)


def retrieve_error(abandoned: asyncio.Future[Any]) -> None:
    """Retrieve the error of work that nobody waits for, so that asyncio does not report it."""
    if not abandoned.cancelled():
        abandoned.exception()


@contextmanager
def _broken_connection_cancels() -> Iterator[None]:
    """End the handler as cancelled if a write fails because the connection broke.

    gRPC raises its own error for such a write, and would log it with a traceback if it left the
    handler.
    """
    try:
        yield
    except grpc.aio.InternalError as error:
        raise asyncio.CancelledError("the connection to the caller broke") from error


def result_sizes(result: object) -> dict[str, Any]:
    """Return the sizes of a result for the log line, and its seconds by stage, if it has any."""
    sizes: dict[str, Any] = {}
    match result:
        case InterveneHeader():
            sizes = {"tokens": len(result.prompt_tokens), "experiments": result.experiments}
        case TraceHeader() | GradientHeader() | ActivationsHeader() | GenerationHeader():
            sizes = {"tokens": len(result.prompt_tokens)}
        case TraceSummary():
            sizes = {"nodes": result.nodes, "edges": result.edges, "stages": _stages(result.times)}
        case GradientSummary():
            sizes = {"matrices": result.matrices, "stages": _stages(result.times)}
        case ActivationsSummary() | InterveneSummary():
            sizes = {"stages": _stages(result.times)}
        case GenerationSummary():
            sizes = {"generated": result.generated, "stages": _stages(result.times)}
        case EditPreview():
            sizes = {"prompts": 1 + len(result.probes)}
        case FoundNeurons():
            sizes = {"neurons": len(result.neurons)}
        case ProjectionTable():
            sizes = {"vectors": len(result.projected)}
    return sizes


def _stages(times: Sequence[StageTime]) -> dict[str, float]:
    return {time.stage: round(time.seconds, 6) for time in times}


def code_of_cancellation(left: float | None) -> grpc.StatusCode:
    """The status to count for a call that its client has ended.

    `left` is the time until the call's deadline in seconds, None without a deadline. A client ends
    a call when its deadline passes by its own timer, usually before the server's timer runs out.
    """
    expired = left is not None and left <= DEADLINE_MARGIN
    return grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED


def rpc_labels(service: str, method: str) -> tuple[str, str, str]:
    """Return the labels `grpc_type`, `grpc_service`, `grpc_method`, as in go-grpc-prometheus."""
    streams = service == SERVICE_NAME and method in _STREAMS
    return "server_stream" if streams else "unary", service, method


def create_series() -> None:
    """Create every metric series at 0, because rates miss the first sample of a series."""
    methods = [(name, rpc.name) for name, service in SERVICES.items() for rpc in service.methods]
    for service_name, method in methods:
        labels = rpc_labels(service_name, method)
        telemetry.STARTED.labels(*labels)
        telemetry.MESSAGES_SENT.labels(*labels)
        telemetry.HANDLING_SECONDS.labels(*labels)
        telemetry.STREAM_BYTES.labels(method)
        for code in grpc.StatusCode:
            telemetry.HANDLED.labels(*labels, code.name)
    for error in STATUS:
        if issubclass(error, IntrospectionError):
            telemetry.REJECTED.labels(error.reason)


def measured(serialize: Serializer, service: str, method: str) -> Serializer:
    """Wrap `serialize` to count the messages of an RPC and their bytes."""
    messages = telemetry.MESSAGES_SENT.labels(*rpc_labels(service, method))
    sizes = telemetry.STREAM_BYTES.labels(method)

    def counting(message: Any) -> bytes:
        serialized = serialize(message)
        messages.inc()
        sizes.inc(len(serialized))
        return serialized

    return counting
