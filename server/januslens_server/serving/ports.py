"""Ports that are the server's own."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


def check_free(host: str, port: int) -> None:
    """Say in one line what keeps a port from being had; gRPC's core logs lines of its own.

    Raises `OSError` with that line.
    """
    try:
        socket.create_server(_address(host, port), family=_family(host)).close()
    except OSError as error:
        raise OSError(f"cannot serve: {error.strerror}") from error


@contextmanager
def reserved(host: str, port: int) -> Iterator[int]:
    """Hold a port that this server's processes share, and no other server; gives its number.

    Sockets share a port where all of them ask for that and belong to one user. Ours is bound before
    it asks, so that it is refused where another server listens or holds; afterwards it refuses
    who has not asked. It never listens: calls come to the processes alone.
    """
    with socket.socket(_family(host)) as holder:
        # Connections that a server before us has closed may linger, while the port is bound ...
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(_address(host, port))
        except OSError as error:
            address = f"{host}:{port}"
            raise OSError(f"cannot serve: {error.strerror} (on {address})") from error
        # ... but nobody else who thinks so may have it, too.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield holder.getsockname()[1]


def _address(host: str, port: int) -> tuple[str, int]:
    return host.strip("[]"), port


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
