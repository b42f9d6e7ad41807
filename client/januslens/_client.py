"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import GenericAlias, TracebackType
from typing import Any, Concatenate, ParamSpec, Self

import grpc
from google.protobuf.message import Message

from januslens import _calls as verbs
from januslens._assemblers import EventT, ResponseT, ResultT
from januslens._connection import (
    DEFAULT_ADDRESS,
    Connection,
    ResponseHook,
    channel_credentials,
    checked_timeout,
)
from januslens._described import described, verb_types
from januslens._event_stream import EventStream
from januslens._results.models import CostEstimate
from januslens._resuming import (
    Exchange,
    ResumableCall,
    ResumableStream,
    ReturnT,
    StreamCall,
    UnaryCall,
)
from januslens.v1.service_pb2_grpc import IntrospectionServiceStub

P = ParamSpec("P")


def _unary(
    verb: Callable[P, Exchange[ReturnT]],
) -> Callable[Concatenate[Client, P], ReturnT]:
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> ReturnT:
        return self._exchange(verb(*args, **kwargs))

    return described(method, verb, verb_types(verb)[-1])


def _estimated(
    verb: Callable[P, StreamCall[ResponseT, EventT, ResultT]],
) -> Callable[Concatenate[Client, P], CostEstimate]:
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> CostEstimate:
        return self._exchange(verbs.estimate(verb(*args, **kwargs)))

    return described(method, verb, CostEstimate, "estimate_", verbs.ESTIMATE_SUMMARY)


def _streamed(
    verb: Callable[P, StreamCall[ResponseT, EventT, ResultT]],
) -> Callable[Concatenate[Client, P], EventStream[EventT, ResultT]]:
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> EventStream[EventT, ResultT]:
        return self._open(verb(*args, **kwargs))

    returns = GenericAlias(EventStream, verb_types(verb)[1:])
    return described(method, verb, returns, prefix="stream_")


def _whole(
    verb: Callable[P, StreamCall[ResponseT, EventT, ResultT]],
) -> Callable[Concatenate[Client, P], ResultT]:
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> ResultT:
        with self._open(verb(*args, **kwargs)) as stream:
            return stream.result()

    return described(method, verb, verb_types(verb)[-1])


class Client:
    """Talks to a Januslens server; thread-safe. Close it, or use it as a context manager.

    Args:
        address: `host:port` of the server, or any name that gRPC resolves, such as
            `dns:///januslens-headless:50051`: calls go round the addresses it stands for.
        token: Sent as `authorization: Bearer ...`, readable on the way without encryption.
        timeout: Seconds for calls that don't give their own; None = no limit.
        secure: Encrypt, trusting the system's certificates.
        root_certificates: Encrypt, trusting the authorities in this PEM file instead.
        client_certificate: Encrypt, showing who asks: PEM files of a certificate and its key.
        credentials: Encrypt with these instead (`grpc.ssl_channel_credentials(...)`).
        resume: Ask another replica for the rest of what was cut, instead of raising.
        on_response: Called with every response message as it arrives, e.g. to record them.
    """

    def __init__(  # noqa: PLR0913 - by keyword
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str | None = None,
        timeout: float | None = None,
        secure: bool = False,
        root_certificates: str | Path | None = None,
        client_certificate: tuple[str | Path, str | Path] | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        resume: bool = False,
        on_response: ResponseHook | None = None,
    ) -> None:
        encryption = channel_credentials(
            secure=secure,
            root_certificates=root_certificates,
            client_certificate=client_certificate,
            credentials=credentials,
        )
        self._connection = Connection(address, token, timeout, encryption, resume, on_response)
        checked_timeout(timeout)
        secured = self._connection.credentials
        options = self._connection.channel_options
        if secured is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            self._channel = grpc.secure_channel(address, secured, options)
        self._stub = IntrospectionServiceStub(self._channel)

    list_models = _unary(verbs.list_models)
    tokenize = _unary(verbs.tokenize)
    project = _unary(verbs.project)
    preview_edit = _unary(verbs.preview_edit)
    find_neurons = _unary(verbs.find_neurons)
    trace = _whole(verbs.trace)
    stream_trace = _streamed(verbs.trace)
    trace_overview = _whole(verbs.trace_overview)
    gradient_lens = _whole(verbs.gradient_lens)
    stream_gradient_lens = _streamed(verbs.gradient_lens)
    estimate_trace = _estimated(verbs.trace)
    estimate_gradient_lens = _estimated(verbs.gradient_lens)

    def _exchange(self, exchange: Exchange[ReturnT]) -> ReturnT:
        try:
            call = next(exchange)
            while True:
                call = exchange.send(self._send(call))
        except StopIteration as finished:
            result: ReturnT = finished.value
            return result

    def _send(self, call: UnaryCall) -> object:
        course = ResumableCall(self._connection, call)
        while True:
            try:
                response: Message = self._start(course)
            except grpc.RpcError as error:
                course.cut(error)
                time.sleep(course.pause)
            else:
                self._connection.seen(response)
                return response

    def _open(self, call: StreamCall[ResponseT, EventT, ResultT]) -> EventStream[EventT, ResultT]:
        return EventStream(self._start, ResumableStream(self._connection, call))

    def _start(self, course: ResumableCall) -> Any:
        """Make the course's next call."""
        return getattr(self._stub, course.method)(
            course.request, timeout=course.timeout, metadata=course.attempt.metadata
        )

    def close(self) -> None:
        """Close the connection; calls that still run are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
