"""Parse requests and serialize responses; reject malformed and oversized requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from januslens_server.errors import InvalidRequest
from januslens_server.rpc.call import SERVICE_NAME, Call, Context, Serializer, measured
from januslens_server.rpc.decode import check_bounds

Deserializer = Callable[[bytes], Any]
Behaviour = Callable[[Any, Context], Awaitable[Any]]

_MALFORMED = object()


class WireFormat(grpc.aio.ServerInterceptor):
    """Parses and serializes messages in place of gRPC.

    Malformed requests end with INVALID_ARGUMENT; gRPC itself would show the parser's error.
    Responses are serialized deterministically: equal messages are equal bytes.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, with our parser and serializer."""
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        service, _, name = details.method[1:].partition("/")
        parse = _tolerant(handler.request_deserializer)
        serialize: Serializer = serialized
        if service == SERVICE_NAME:
            serialize = measured(serialized, name)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _refusing(service, name, handler.unary_stream), parse, serialize
            )
        return grpc.unary_unary_rpc_method_handler(
            _refusing(service, name, handler.unary_unary), parse, serialize
        )


def _tolerant(parse: Deserializer) -> Deserializer:
    def tolerant(received: bytes) -> Any:
        try:
            return parse(received)
        except DecodeError:
            return _MALFORMED

    return tolerant


def _check(name: str, request: Any) -> None:
    if request is _MALFORMED:
        raise InvalidRequest("request", f"malformed message; expected a request of {name}")
    check_bounds(request)


def _refusing(service: str, name: str, answer: Behaviour) -> Any:
    async def refusing(request: Any, context: Context) -> Any:
        try:
            _check(name, request)
        except InvalidRequest as error:
            async with Call(name, context, service):
                raise error from None
        return await answer(request, context)

    return refusing


def serialized(message: Message | bytes) -> bytes:
    """Serialize deterministically; bytes are returned unchanged.

    By default protobuf writes the entries of a map in an order that differs between processes.
    """
    if isinstance(message, bytes):
        return message
    return message.SerializeToString(deterministic=True)
