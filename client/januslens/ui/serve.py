"""Listening: where, by which names, until when."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Callable

import uvicorn

from januslens.ui.app import application
from januslens.ui.gateway import Gateway

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_STOP_SECONDS = 2  # for streams that are still running when the page is stopped


def serve(
    connect: Callable[[], Gateway],
    host: str,
    port: int,
    *,
    exposed: bool,
    announce: Callable[[str], object],
) -> None:
    """Serve the page until interrupted.

    Args:
        connect: Makes the client of the gRPC server.
        host: An address of this machine, or `localhost`.
        port: Where to listen; 0 = any free port.
        exposed: Whether `host` may be another than loopback.
        announce: Called with the page's address, token included, once it can be opened.

    Raises:
        ValueError: The host is not loopback and not to be exposed, or means all addresses.
        OSError: The port is taken, or the address is not this machine's.
    """
    listener = _listener(host, port, exposed)
    token = secrets.token_urlsafe(24)
    shown = f"[{host}]" if ":" in host else host
    app = application(connect, {*_LOOPBACK_NAMES, shown}, token)
    config = uvicorn.Config(
        app,
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=_STOP_SECONDS,
    )
    announce(f"http://{shown}:{listener.getsockname()[1]}/#token={token}")
    uvicorn.Server(config).run(sockets=[listener])


def _listener(host: str, port: int, exposed: bool) -> socket.socket:
    family, address = _resolved(host, port)
    if address.is_unspecified:
        raise ValueError(f"expected one address to listen on; {host} means all")
    if not (address.is_loopback or exposed):
        raise ValueError(f"{host} is not loopback, others could reach the page: --expose allows it")
    return socket.create_server((str(address), port), family=family)


def _resolved(
    host: str, port: int
) -> tuple[socket.AddressFamily, ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """The first address of a name, so that what is checked is what is listened on."""
    family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, ipaddress.ip_address(where[0])
