"""Who asks: known before anything of the request is read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health

from januslens_server.access.directory import Directory
from januslens_server.errors import IntrospectionError, PermissionDenied
from januslens_server.rpc.callers import Context, asked_by
from januslens_server.rpc.calls import Call
from januslens_server.rpc.methods import SERVICE_NAME

AUTHORIZATION = "authorization"
SCHEME = "bearer "


class Authentication(grpc.aio.ServerInterceptor):
    """Finds the caller of every RPC but those of health, and refuses who may not call it.

    A refused request is not parsed.
    """

    def __init__(self, directory: Directory) -> None:
        """`directory` knows the callers."""
        self._directory = directory

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler for a caller who may call it, else one that says why not."""
        handler = await continuation(details)
        service, _, name = details.method.lstrip("/").partition("/")
        if handler is None or service == health.SERVICE_NAME:
            return handler
        try:
            caller = self._directory.caller(_token(details))
            if service == SERVICE_NAME and not caller.may_call(name):
                raise PermissionDenied(f"{caller.name} may not call {name}")
        except IntrospectionError as error:
            return _refusing(service, name, error, handler)
        asked_by(caller)  # gRPC runs the handler in the task that runs this
        return handler


def _token(details: grpc.HandlerCallDetails) -> str | None:
    for key, value in details.invocation_metadata or ():
        if key == AUTHORIZATION and isinstance(value, str) and value.lower().startswith(SCHEME):
            return value[len(SCHEME) :].strip()
    return None


def _refusing(service: str, name: str, error: IntrospectionError, handler: Any) -> Any:
    """A handler of the same kind that ends every call with `error`."""

    async def refuse(_request: Any, context: Context) -> None:
        async with Call(name, context, service):
            raise error

    if handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse)
    return grpc.unary_unary_rpc_method_handler(refuse)
