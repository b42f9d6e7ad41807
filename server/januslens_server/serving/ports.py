"""Ports that are the server's own."""

from __future__ import annotations

import socket


def check_free(host: str, port: int) -> None:
    """Say in one line what keeps a port from being had; gRPC's core logs lines of its own.

    Raises `OSError` with that line.
    """
    try:
        socket.create_server(_address(host, port), family=_family(host)).close()
    except OSError as error:
        raise OSError(f"cannot serve: {error.strerror}") from error


def _address(host: str, port: int) -> tuple[str, int]:
    return host.strip("[]"), port


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
