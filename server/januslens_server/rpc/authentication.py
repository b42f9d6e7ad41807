"""Authenticate callers and check scopes and rates, before a request is received."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any

import grpc
from grpc_health.v1 import health

from januslens_server.access.callers import Caller, Quotas
from januslens_server.access.directory import Directory
from januslens_server.access.quotas import QuotaBook
from januslens_server.errors import IntrospectionError, PermissionDenied, QuotaSpent
from januslens_server.rpc.call import (
    ADMIN_NAME,
    SERVICE_NAME,
    SERVICES,
    Call,
    Context,
    set_current_caller,
)

AUTHORIZATION = "authorization"
SCHEME = "bearer "


class Authentication(grpc.aio.ServerInterceptor):
    """Identifies the caller of each RPC and refuses calls that the caller may not make.

    Health checks need no caller. The message of a refused request is not received. Admitted
    requests count against the caller's quotas.
    """

    def __init__(self, directory: Directory, quotas: QuotaBook) -> None:
        """`directory` finds callers by token; `quotas` tracks their usage."""
        self._directory = directory
        self._quotas = quotas

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the method's handler, or one that refuses the call with the reason."""
        handler = await continuation(details)
        service, _, name = details.method.lstrip("/").partition("/")
        if handler is None or service == health.SERVICE_NAME:
            return handler
        try:
            caller = self._directory.caller(_token(details))
            _check_scope(caller, service, name)
        except IntrospectionError as error:
            return _refusing(service, name, error, handler)
        set_current_caller(caller)  # gRPC runs the handler in this task
        if service not in SERVICES or caller.quotas == Quotas():
            return handler
        return _like(handler, self._counted(service, name, caller, handler))

    def _counted(self, service: str, name: str, caller: Caller, handler: Any) -> Any:
        answer = handler.stream_stream or handler.stream_unary

        async def counted(messages: object, context: Context) -> Any:
            with ExitStack() as open_request:
                try:
                    open_request.enter_context(self._quotas.request(caller))
                except QuotaSpent as spent:
                    async with Call(name, context, service):
                        raise spent from None
                return await answer(messages, context)

        return counted


def _token(details: grpc.HandlerCallDetails) -> str | None:
    for key, value in details.invocation_metadata or ():
        if key == AUTHORIZATION and isinstance(value, str) and value.lower().startswith(SCHEME):
            return value[len(SCHEME) :].strip()
    return None


def _check_scope(caller: Caller, service: str, name: str) -> None:
    """Raise `PermissionDenied` if the caller may not call the RPC."""
    if service == SERVICE_NAME and not caller.may_call(name):
        raise PermissionDenied(f"caller {caller.name!r} may not call {name}")
    if service == ADMIN_NAME and not caller.admin:
        raise PermissionDenied(
            f"caller {caller.name!r} may not call {name}: expected a caller with 'admin: true'"
            if caller.name
            else f"{name} is disabled on this server; the operator may enable it with --loadable"
        )


def _refusing(service: str, name: str, error: IntrospectionError, handler: Any) -> Any:
    """Return a handler of the same kind that ends every call with `error`."""

    async def refuse(_messages: object, context: Context) -> None:
        async with Call(name, context, service):
            raise error

    return _like(handler, refuse)


def _like(handler: Any, answer: Any) -> Any:
    """Return a handler of the same kind that calls `answer`.

    The requests of all handlers are streams, because `WireFormat` has replaced the handlers.
    """
    make = grpc.stream_unary_rpc_method_handler
    if handler.response_streaming:
        make = grpc.stream_stream_rpc_method_handler
    return make(answer, handler.request_deserializer, handler.response_serializer)
