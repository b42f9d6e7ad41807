"""Build the gRPC server with its services, interceptors and options."""

from __future__ import annotations

import logging

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from januslens.v1 import service_pb2_grpc
from januslens_server.access.directory import Directory, OpenDirectory
from januslens_server.access.quotas import QuotaBook
from januslens_server.rpc import methods
from januslens_server.rpc.authentication import Authentication
from januslens_server.rpc.health import Health
from januslens_server.rpc.methods import SERVICE_NAME
from januslens_server.rpc.options import PeerLimits, server_options
from januslens_server.rpc.service import IntrospectionService
from januslens_server.rpc.wire import WireFormat

# gRPC logs what its handlers raise under this name.
GRPC_LOGGER = "grpc._cython.cygrpc"


def _is_no_departure(record: logging.LogRecord) -> bool:
    """Drop the tracebacks of answers whose peers have left, which any peer can cause."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or kind.__name__ not in {"ExecuteBatchError", "InternalError"}


def build_server(
    service: IntrospectionService,
    health_service: Health,
    max_connection_age: float | None = None,
    directory: Directory | None = None,
    quotas: QuotaBook | None = None,
    *,
    share_port: bool = False,
    peers: PeerLimits | None = None,
) -> grpc.aio.Server:
    """Build a server with introspection, health and reflection; it does not listen yet.

    Connections older than `max_connection_age` seconds accept no new calls and finish running ones.
    `directory` finds callers by token and `quotas` tracks their usage; without them everyone may
    call everything. `share_port` lets several processes of one user listen on the same port.
    """
    methods.create_series()
    logging.getLogger(GRPC_LOGGER).addFilter(_is_no_departure)
    options = server_options(peers, share_port=share_port)
    if max_connection_age is not None:
        options.append(("grpc.max_connection_age_ms", round(1000 * max_connection_age)))
    authentication = Authentication(directory or OpenDirectory(), quotas or QuotaBook())
    interceptors = [authentication, WireFormat()]
    server = grpc.aio.server(interceptors=interceptors, options=options)
    service_pb2_grpc.add_IntrospectionServiceServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return server
