"""The gRPC channels of both clients, and the responses of a running stream.

The synchronous client is generated from the asynchronous one by removing `await`. This module has
the parts for which that is not enough: event loops, cancellation and waiting.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol, Self, TypeVar

import grpc

from januslens._connection import Connection
from januslens._resuming import ResumableCall
from januslens.v1.admin_pb2_grpc import AdminServiceStub
from januslens.v1.service_pb2_grpc import IntrospectionServiceStub

T = TypeVar("T")


class _Stubs:
    """The RPCs of both services."""

    def __init__(self, channel: Any) -> None:
        self._introspection = IntrospectionServiceStub(channel)
        self._admin = AdminServiceStub(channel)

    def method(self, name: str) -> Any:
        """Return the method of an RPC."""
        offered = self._admin if hasattr(self._admin, name) else self._introspection
        return getattr(offered, name)


class _Responses(Protocol):
    """The methods that this module uses of gRPC's object for a running stream."""

    def __next__(self) -> Any: ...
    def cancel(self) -> object: ...


class Responses:
    """The responses of a running stream, for one thread at a time.

    Iteration ends when any thread calls `cancel`.
    """

    def __init__(self, call: _Responses) -> None:
        self._call = call
        self._cancelled = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._call)
        except grpc.RpcError:
            if self._cancelled:
                raise StopIteration from None
            raise

    def cancel(self) -> None:
        """Cancel the call if it is still running; the server stops computing."""
        self._cancelled = True
        self._call.cancel()


class Channel:
    """The connection of a synchronous client, shared by all threads."""

    def __init__(self, connection: Connection) -> None:
        options = connection.channel_options
        if connection.credentials is None:
            self._channel = grpc.insecure_channel(connection.address, options)
        else:
            self._channel = grpc.secure_channel(connection.address, connection.credentials, options)
        intercepted = grpc.intercept_channel(self._channel, *connection.interceptors)
        self._stubs = _Stubs(intercepted)

    def response(self, call: ResumableCall) -> Any:
        """Make a unary call and return its response."""
        return self._start(call)

    def responses(self, call: ResumableCall) -> Responses:
        """Start a streaming call."""
        return Responses(self._start(call))

    def _start(self, call: ResumableCall) -> Any:
        method = self._stubs.method(call.method)
        return method(call.request, timeout=call.timeout, metadata=call.attempt.metadata)

    def sleep(self, seconds: float) -> None:
        """Wait before another attempt."""
        time.sleep(seconds)

    def finished(self, work: Coroutine[Any, Any, T]) -> T:
        """Run asynchronous work that has connections of its own, and return its result.

        In a thread that runs an event loop, such as that of a notebook, the work gets another one.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(work)
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, work).result()

    def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        self._channel.close()


class _AsyncResponses(Protocol):
    """The methods that this module uses of gRPC's object for a running asynchronous stream."""

    def __aiter__(self) -> AsyncIterator[Any]: ...
    def cancel(self) -> bool: ...


class AsyncResponses:
    """The responses of a running asynchronous stream.

    Iteration ends when `cancel` is called. Dropping the last reference cancels the call.
    """

    def __init__(self, call: _AsyncResponses) -> None:
        self._loop = asyncio.get_running_loop()
        self._call = call
        self._received = aiter(call)
        self._cancelled = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        try:
            return await anext(self._received)
        except asyncio.CancelledError:
            if self._cancelled:  # `cancel` cancelled the call; nobody cancelled this task
                raise StopAsyncIteration from None
            raise

    def cancel(self) -> None:
        """Cancel the call if it is still running; the server stops computing."""
        self._cancelled = True
        self._call.cancel()

    def __del__(self) -> None:
        """Cancel the call, because gRPC keeps its own object of a running call alive.

        Python may run this method in any thread. The call must be cancelled in the thread of its
        event loop.
        """
        if self._cancelled or self._loop.is_closed():
            return
        with suppress(RuntimeError):  # the loop was closed meanwhile
            self._loop.call_soon_threadsafe(self._call.cancel)


class AsyncChannel:
    """The connections of an asynchronous client: one for each event loop."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._channels: dict[asyncio.AbstractEventLoop, tuple[grpc.aio.Channel, _Stubs]] = {}

    async def response(self, call: ResumableCall) -> Any:
        """Make a unary call and return its response."""
        running = self._start(call)
        try:
            return await running
        finally:
            running.cancel()  # has no effect on a finished call

    def responses(self, call: ResumableCall) -> AsyncResponses:
        """Start a streaming call."""
        return AsyncResponses(self._start(call))

    def _start(self, call: ResumableCall) -> Any:
        method = self._stubs().method(call.method)
        return method(call.request, timeout=call.timeout, metadata=call.attempt.metadata)

    def _stubs(self) -> _Stubs:
        """Return the stubs of the running event loop; create it, with its channel, if needed."""
        loop = asyncio.get_running_loop()
        if loop not in self._channels:
            self._forget_closed_loops()
            channel = self._new_channel()
            self._channels[loop] = (channel, _Stubs(channel))
        return self._channels[loop][1]

    def _new_channel(self) -> grpc.aio.Channel:
        address, credentials = self._connection.address, self._connection.credentials
        options, interceptors = self._connection.channel_options, self._connection.interceptors
        if credentials is None:
            return grpc.aio.insecure_channel(address, options, interceptors=interceptors)
        return grpc.aio.secure_channel(address, credentials, options, interceptors=interceptors)

    def _forget_closed_loops(self) -> None:
        """Drop channels that can no longer be used or closed; gRPC then closes them."""
        for loop in [loop for loop in self._channels if loop.is_closed()]:
            del self._channels[loop]

    async def sleep(self, seconds: float) -> None:
        """Wait before another attempt."""
        await asyncio.sleep(seconds)

    async def finished(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for asynchronous work that has connections of its own, and return its result."""
        return await work

    async def close(self) -> None:
        """Close the connections of all event loops; running calls are cancelled."""
        self._forget_closed_loops()
        here = asyncio.get_running_loop()
        while self._channels:
            loop, (channel, _) = self._channels.popitem()
            if loop is here:
                await channel.close()
            elif loop.is_running():
                closing = asyncio.run_coroutine_threadsafe(channel.close(), loop)
                await asyncio.wrap_future(closing)
