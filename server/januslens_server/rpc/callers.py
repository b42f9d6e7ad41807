"""Whom a call belongs to."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import grpc

from januslens_server.access.callers import ANYONE, NAME, Caller

Context = grpc.aio.ServicerContext[Any, Any]

UNKNOWN = "unknown"

_ASKING: ContextVar[Caller] = ContextVar("asking", default=ANYONE)


def asking() -> Caller:
    """The caller of the RPC that is being handled."""
    return _ASKING.get()


def asked_by(caller: Caller) -> None:
    """From now on this task handles an RPC of `caller`."""
    _ASKING.set(caller)


def caller_of(context: Context) -> str:
    """The name under which a call is logged, and between which the device is shared fairly.

    It is that of the caller's token, else that in its certificate; callers without either are told
    apart by the address that they come from, without port.
    """
    return asking().name or _certified(context) or address_of(context)


def _certified(context: Context) -> str | None:
    """The common name of a certificate that an authority of ours has signed."""
    for name in (context.auth_context() or {}).get("x509_common_name", ()):
        if NAME.fullmatch(name.decode(errors="replace")):
            return name.decode()
    return None


def address_of(context: Context) -> str:
    """The address that a call comes from, without its port."""
    transport, _, address = (context.peer() or "").partition(":")
    if transport == "ipv4":
        return address.rpartition(":")[0]
    if transport == "ipv6":
        host = address.rpartition(":")[0].replace("%5B", "[").replace("%5D", "]")
        return host.strip("[]")
    return transport or UNKNOWN
