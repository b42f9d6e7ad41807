"""The asynchronous client: the same verbs, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
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
from januslens._event_stream import AsyncEventStream
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
Awaited = Coroutine[Any, Any, ReturnT]


def _unary(
    verb: Callable[P, Exchange[ReturnT]],
) -> Callable[Concatenate[AsyncClient, P], Awaited[ReturnT]]:
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> ReturnT:
        return await self._exchange(verb(*args, **kwargs))

    return described(method, verb, verb_types(verb)[-1])


def _estimated(
    verb: Callable[P, StreamCall[ResponseT, EventT, ResultT]],
) -> Callable[Concatenate[AsyncClient, P], Awaited[CostEstimate]]:
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> CostEstimate:
        return await self._exchange(verbs.estimate(verb(*args, **kwargs)))

    return described(method, verb, CostEstimate, "estimate_", verbs.ESTIMATE_SUMMARY)


def _streamed(
    verb: Callable[P, StreamCall[ResponseT, EventT, ResultT]],
) -> Callable[Concatenate[AsyncClient, P], AsyncEventStream[EventT, ResultT]]:
    def method(
        self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs
    ) -> AsyncEventStream[EventT, ResultT]:
        return self._open(verb(*args, **kwargs))

    returns = GenericAlias(AsyncEventStream, verb_types(verb)[1:])
    return described(method, verb, returns, prefix="stream_")


def _whole(
    verb: Callable[P, StreamCall[ResponseT, EventT, ResultT]],
) -> Callable[Concatenate[AsyncClient, P], Awaited[ResultT]]:
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> ResultT:
        async with self._open(verb(*args, **kwargs)) as stream:
            return await stream.result()

    return described(method, verb, verb_types(verb)[-1])


class AsyncClient:
    """Talks to a Januslens server. Close it, or use `async with`.

    The arguments are those of `Client`; so are the methods, to be awaited, but for the two that
    return a stream to iterate with `async for`. It may be used in several event loops: each has a
    connection of its own.
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
        checked_timeout(timeout)
        self._connection = Connection(address, token, timeout, encryption, resume, on_response)
        self._channels: dict[
            asyncio.AbstractEventLoop, tuple[grpc.aio.Channel, IntrospectionServiceStub]
        ] = {}

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

    @property
    def _stub(self) -> IntrospectionServiceStub:
        """The running event loop's stub; its first call makes it, on a channel of its own."""
        loop = asyncio.get_running_loop()
        if loop not in self._channels:
            self._forget_closed_loops()
            channel = self._new_channel()
            self._channels[loop] = (channel, IntrospectionServiceStub(channel))
        return self._channels[loop][1]

    def _new_channel(self) -> grpc.aio.Channel:
        address, secured = self._connection.address, self._connection.credentials
        options = self._connection.channel_options
        if secured is None:
            return grpc.aio.insecure_channel(address, options)
        return grpc.aio.secure_channel(address, secured, options)

    def _forget_closed_loops(self) -> None:
        """Drop the channels that nobody can use or close any more; gRPC closes them then."""
        for loop in [loop for loop in self._channels if loop.is_closed()]:
            del self._channels[loop]

    async def _exchange(self, exchange: Exchange[ReturnT]) -> ReturnT:
        try:
            call = next(exchange)
            while True:
                call = exchange.send(await self._send(call))
        except StopIteration as finished:
            result: ReturnT = finished.value
            return result

    async def _send(self, call: UnaryCall) -> object:
        course = ResumableCall(self._connection, call)
        while True:
            try:
                response = await self._response(course)
            except grpc.RpcError as error:
                course.cut(error)
                await asyncio.sleep(course.pause)
            else:
                self._connection.seen(response)
                return response

    async def _response(self, course: ResumableCall) -> Message:
        call = self._start(course)
        try:
            response: Message = await call
        finally:
            call.cancel()  # without effect on one that has finished
        return response

    def _open(
        self, call: StreamCall[ResponseT, EventT, ResultT]
    ) -> AsyncEventStream[EventT, ResultT]:
        return AsyncEventStream(self._start, ResumableStream(self._connection, call))

    def _start(self, course: ResumableCall) -> Any:
        """Make the course's next call."""
        return getattr(self._stub, course.method)(
            course.request, timeout=course.timeout, metadata=course.attempt.metadata
        )

    async def close(self) -> None:
        """Close all connections; calls that still run are cancelled."""
        self._forget_closed_loops()
        here = asyncio.get_running_loop()
        while self._channels:
            loop, (channel, _) = self._channels.popitem()
            if loop is here:
                await channel.close()
            elif loop.is_running():
                closing = asyncio.run_coroutine_threadsafe(channel.close(), loop)
                await asyncio.wrap_future(closing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
