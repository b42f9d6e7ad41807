"""Open a server's ports: gRPC, plaintext health, and metrics."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from prometheus_client import REGISTRY, CollectorRegistry, start_http_server

from januslens_server.config import ServerSettings
from januslens_server.rpc.health import Health, build_health_server
from januslens_server.rpc.tls import CertificateFiles

logger = logging.getLogger("januslens_server")


async def listen(
    server: grpc.aio.Server, health: Health, settings: ServerSettings
) -> grpc.aio.Server | None:
    """Open all ports; gives the server of the health port, if there is to be one.

    Raises `OSError` where one cannot be had.
    """
    check_free(settings.host, settings.port)
    port = add_port(server, settings)
    listen_for_metrics(settings)
    health_server = await listen_for_health(health, settings)
    await server.start()
    logger.info("serving on %s:%d", settings.host, port)
    return health_server


def listen_for_metrics(settings: ServerSettings, shown: CollectorRegistry = REGISTRY) -> None:
    """Show metrics on their port, for as long as the process lives."""
    host, port = settings.metrics_host, settings.metrics_port
    check_free(host, port)
    metrics, _ = start_http_server(port, host, shown)
    logger.info("metrics on http://%s:%d/metrics", host, metrics.server_port)


def add_port(server: grpc.aio.Server, settings: ServerSettings) -> int:
    """Have the server take its port; gives its number."""
    address = f"{settings.host}:{settings.port}"
    certificate, key = settings.tls_certificate, settings.tls_key
    if certificate is None or key is None:
        return server.add_insecure_port(address)
    files = CertificateFiles(certificate, key, settings.tls_client_ca)
    try:
        return server.add_secure_port(address, files.credentials())
    except OSError as error:
        raise OSError(f"cannot serve: {error}") from error


async def listen_for_health(health: Health, settings: ServerSettings) -> grpc.aio.Server | None:
    """Answer health on a port of its own, if there is to be one; gives that server."""
    if settings.health_port is None:
        return None
    check_free(settings.host, settings.health_port)
    server = build_health_server(health)
    port = server.add_insecure_port(f"{settings.host}:{settings.health_port}")
    await server.start()
    logger.info("health on %s:%d", settings.host, port)
    return server


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
