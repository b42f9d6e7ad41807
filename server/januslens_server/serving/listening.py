"""A server's ports: for calls, for health in plaintext, and for metrics."""

from __future__ import annotations

import logging

import grpc
from prometheus_client import REGISTRY, CollectorRegistry, start_http_server

from januslens_server.config import ServerSettings
from januslens_server.rpc.health import Health, build_health_server
from januslens_server.rpc.tls import CertificateFiles
from januslens_server.serving.ports import check_free

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
