"""The synchronous client."""

from __future__ import annotations

from collections.abc import Callable
from types import GenericAlias, TracebackType
from typing import Concatenate, ParamSpec, Self

import grpc

from januslens import _verbs as verbs
from januslens._connection import (
    CHANNEL_OPTIONS,
    DEFAULT_ADDRESS,
    Attempt,
    ResponseHook,
    connection,
)
from januslens._described import described, verb_types
from januslens._event_stream import EventStream
from januslens._results.cost import CostEstimate
from januslens._stream.assembler import EventT, ResponseT, ResultT
from januslens._verbs.calls import Exchange, ReturnT, StreamCall, UnaryCall
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
        address: `host:port` of the server.
        token: Sent as `authorization: Bearer ...`, readable on the way unless `secure`.
        timeout: Seconds for calls that don't give their own; None = no limit.
        secure: Encrypt, trusting the system's certificates.
        credentials: Encrypt with these instead (`grpc.ssl_channel_credentials(...)`).
        on_response: Called with every response message as it arrives, e.g. to record them.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str | None = None,
        timeout: float | None = None,
        secure: bool = False,
        credentials: grpc.ChannelCredentials | None = None,
        on_response: ResponseHook | None = None,
    ) -> None:
        self._connection = connection(
            address,
            token=token,
            timeout=timeout,
            secure=secure,
            credentials=credentials,
            on_response=on_response,
        )
        secured = self._connection.credentials
        if secured is None:
            self._channel = grpc.insecure_channel(address, CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, secured, CHANNEL_OPTIONS)
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
        attempt = Attempt(self._connection)
        try:
            response = getattr(self._stub, call.method)(
                call.request,
                timeout=self._connection.deadline(call.timeout),
                metadata=attempt.metadata,
            )
        except grpc.RpcError as error:
            raise attempt.failure(error) from error
        self._connection.seen(response)
        return response

    def _open(self, call: StreamCall[ResponseT, EventT, ResultT]) -> EventStream[EventT, ResultT]:
        attempt = Attempt(self._connection)
        responses = getattr(self._stub, call.method)(
            call.request,
            timeout=self._connection.deadline(call.timeout),
            metadata=attempt.metadata,
        )
        return EventStream(responses, call.assembler, attempt)

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
