"""The contract's RPCs by name, and the metrics of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from januslens.v1 import service_pb2
from januslens_server import telemetry
from januslens_server.errors import IntrospectionError
from januslens_server.rpc.status import STATUS

SERVICE = service_pb2.DESCRIPTOR.services_by_name["IntrospectionService"]
SERVICE_NAME = SERVICE.full_name
RPCS = tuple(method.name for method in SERVICE.methods)


Serializer = Callable[[Any], bytes]

_STREAMS = {method.name for method in SERVICE.methods if method.server_streaming}


def rpc_labels(service: str, method: str) -> tuple[str, str, str]:
    """Values of `grpc_type`, `grpc_service` and `grpc_method`, as in go-grpc-prometheus."""
    streams = service == SERVICE_NAME and method in _STREAMS
    return "server_stream" if streams else "unary", service, method


def create_series() -> None:
    """Create every metric series at 0; rates miss the step from an absent series to 1."""
    for method in SERVICE.methods_by_name:
        labels = rpc_labels(SERVICE_NAME, method)
        telemetry.STARTED.labels(*labels)
        telemetry.MESSAGES_SENT.labels(*labels)
        telemetry.HANDLING_SECONDS.labels(*labels)
        telemetry.STREAM_BYTES.labels(method)
        for code in grpc.StatusCode:
            telemetry.HANDLED.labels(*labels, code.name)
    for error in STATUS:
        if issubclass(error, IntrospectionError):
            telemetry.REJECTED.labels(error.reason)


def measured(serialize: Serializer, method: str) -> Serializer:
    """Wrap `serialize` to count the messages of an RPC and their bytes."""
    messages = telemetry.MESSAGES_SENT.labels(*rpc_labels(SERVICE_NAME, method))
    sizes = telemetry.STREAM_BYTES.labels(method)

    def counting(message: Any) -> bytes:
        serialized = serialize(message)
        messages.inc()
        sizes.inc(len(serialized))
        return serialized

    return counting


class StreamMeter:
    """Measures how long each message of a stream takes to write, and when the first was sent."""

    def __init__(self, method: str, started: float) -> None:
        """`started` is the start of the call, by `time.perf_counter`."""
        self._method = method
        self._started = started
        self._any = False

    @contextmanager
    def message(self) -> Iterator[None]:
        """Measure the write of one message, also if it fails."""
        with telemetry.WRITE_STALL_SECONDS.time():
            yield
        if not self._any:
            self._any = True
            first = telemetry.FIRST_MESSAGE_SECONDS.labels(self._method)
            first.observe(time.perf_counter() - self._started)
