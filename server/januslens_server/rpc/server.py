"""The gRPC server with all its services on one port."""

from __future__ import annotations

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
from januslens_server.rpc.options import server_options
from januslens_server.rpc.service import IntrospectionService
from januslens_server.rpc.wire import WireFormat


def build_server(
    service: IntrospectionService,
    health_service: Health,
    max_connection_age: float | None = None,
    directory: Directory | None = None,
    quotas: QuotaBook | None = None,
    *,
    share_port: bool = False,
) -> grpc.aio.Server:
    """Introspection, health and reflection, not yet listening.

    A connection older than `max_connection_age` seconds takes no further calls; those that run on
    it come to their end. `directory` knows who may ask for what, and `quotas` how much of it has
    been taken; without them anyone may ask for anything. `share_port` lets processes of this user
    that ask for it listen on the same one.
    """
    methods.create_series()
    options = server_options(share_port=share_port)
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
