"""Receive and parse requests and serialize responses; reject malformed and oversized requests."""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health

from januslens_server.errors import IntrospectionError, InvalidRequest
from januslens_server.rpc.call import (
    SERVICES,
    Call,
    Context,
    Serializer,
    caller_name,
    measured,
)
from januslens_server.rpc.decode import COUNTED_BYTES, check_bounds, check_counts
from januslens_server.rpc.places import PREPARATION
from januslens_server.rpc.reception import Receptions, receive_health_check

Deserializer = Callable[[bytes], Any]
Behaviour = Callable[[Any, Context], Awaitable[Any]]


class WireFormat(grpc.aio.ServerInterceptor):
    """Receives, parses and serializes messages in place of gRPC.

    Malformed requests end with INVALID_ARGUMENT; gRPC itself would show the parser's error.
    Requests are received within bounds (`rpc.reception`). Responses are serialized
    deterministically: equal messages are equal bytes.
    """

    def __init__(self) -> None:
        """Create one for each server; its bounds hold for all calls of the server."""
        self._receptions = Receptions()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return a handler that receives and parses the request message itself."""
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        service, _, name = details.method[1:].partition("/")
        serialize: Serializer = serialized
        if service in SERVICES:
            serialize = measured(serialized, service, name)
        answer = self._received(service, name, handler)
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(answer, None, serialize)
        return grpc.stream_unary_rpc_method_handler(answer, None, serialize)

    def _received(self, service: str, name: str, handler: Any) -> Any:
        answer: Behaviour = handler.unary_stream or handler.unary_unary
        parse: Deserializer = handler.request_deserializer

        async def received(_messages: object, context: Context) -> Any:
            try:
                return await receive_and_answer(context)
            except BaseException as error:
                _release_locals(error)
                raise

        async def receive_and_answer(context: Context) -> Any:
            with ExitStack() as held:
                try:
                    if service == health.SERVICE_NAME:
                        message = await receive_health_check(context)
                    else:
                        caller = caller_name(context)
                        message = await self._receptions.receive(context, caller, held)
                    work = partial(_parsed, service, name, parse, message)
                    large = message is not None and len(message) > COUNTED_BYTES
                    del message
                    # Counting and parsing many fields takes up to 0.2 s.
                    request = await PREPARATION.run("", work) if large else work()
                    del work
                except IntrospectionError as error:
                    held.close()
                    async with Call(name, context, service):
                        raise error from None
                return await answer(request, context)

        return received


def _release_locals(error: BaseException) -> None:
    """Clear the local variables of the finished functions that an error passed through.

    gRPC keeps the error of a call in a reference cycle. Its traceback would keep the request, up to
    some 20 MiB, until Python's next full collection.
    """
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        traceback.clear_frames(found.__traceback__)
        found = found.__cause__ or found.__context__


def _parsed(service: str, name: str, parse: Deserializer, message: bytes | None) -> Any:
    """Parse the request. Raises `InvalidRequest` if it is malformed or a field is too long."""
    if message is None:
        raise InvalidRequest("request", f"no request message received; send one {name} request")
    if service in SERVICES:
        check_counts(SERVICES[service].methods_by_name[name].input_type, message)
    try:
        request = parse(message)
    except DecodeError:
        raise InvalidRequest("request", f"message is not a valid {name} request") from None
    check_bounds(request)
    return request


def serialized(message: Message | bytes) -> bytes:
    """Serialize deterministically; bytes are returned unchanged.

    By default protobuf writes the entries of a map in an order that differs between processes.
    """
    if isinstance(message, bytes):
        return message
    return message.SerializeToString(deterministic=True)
