"""Whom a call belongs to."""

from __future__ import annotations

from typing import Any

import grpc

Context = grpc.aio.ServicerContext[Any, Any]

UNKNOWN = "unknown"


def caller_of(context: Context) -> str:
    """The name under which a call is logged, and between which the device is shared fairly.

    Callers without credentials are told apart by the address that they come from, without port.
    """
    transport, _, address = (context.peer() or "").partition(":")
    if transport == "ipv4":
        return address.rpartition(":")[0]
    if transport == "ipv6":
        host = address.rpartition(":")[0].replace("%5B", "[").replace("%5D", "]")
        return host.strip("[]")
    return transport or UNKNOWN
