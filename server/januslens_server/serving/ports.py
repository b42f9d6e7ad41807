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
    """Open all ports; return the server of the health port, or None if there is none.

    Raises `OSError` if a port is not available.
    """
    check_port_free(settings.host, settings.port)
    port = add_port(server, settings)
    listen_for_metrics(settings)
    health_server = await listen_for_health(health, settings)
    await server.start()
    address = f"{settings.host}:{port}"
    logger.info("serving on %s", address, extra={"address": address})
    return health_server


def listen_for_metrics(settings: ServerSettings, shown: CollectorRegistry = REGISTRY) -> None:
    """Serve the metrics page until the process ends."""
    host, port = settings.metrics_host, settings.metrics_port
    check_port_free(host, port)
    metrics, _ = start_http_server(port, host.strip("[]"), shown)
    logger.info("metrics on http://%s:%d/metrics", host, metrics.server_port)


def add_port(server: grpc.aio.Server, settings: ServerSettings) -> int:
    """Bind the gRPC port, with TLS if configured; return its number."""
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
    """Open the plaintext health port; return its server, or None if not configured."""
    if settings.health_port is None:
        return None
    check_port_free(settings.host, settings.health_port)
    server = build_health_server(health)
    port = server.add_insecure_port(f"{settings.host}:{settings.health_port}")
    await server.start()
    logger.info("health on %s:%d", settings.host, port)
    return server


def check_port_free(host: str, port: int) -> None:
    """Raise `OSError` with a one-line message if a port is not available.

    Without this check, gRPC's core would log several lines instead.
    """
    try:
        socket.create_server(_address(host, port), family=_family(host)).close()
    except OSError as error:
        raise OSError(f"cannot serve: {error.strerror}") from error


@contextmanager
def reserve_port(host: str, port: int) -> Iterator[int]:
    """Reserve a port for the processes of this server only, and yield its number.

    Sockets of one user share a port if all of them set SO_REUSEPORT. This socket binds before it
    sets the option, so that binding fails if another server has the port. It never listens, so all
    connections go to the processes.
    """
    with socket.socket(_family(host)) as holder:
        # Allow binding while closed connections of an earlier server still exist,
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(_address(host, port))
        except OSError as error:
            address = f"{host}:{port}"
            raise OSError(f"cannot serve: {error.strerror} (on {address})") from error
        # but do not let another socket bind with the same option.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield holder.getsockname()[1]


def _address(host: str, port: int) -> tuple[str, int]:
    return host.strip("[]"), port


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
