"""Build the gRPC server with its services, interceptors and options."""

from __future__ import annotations

import logging
import traceback

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from januslens.v1 import admin_pb2_grpc, service_pb2_grpc
from januslens_server.access.directory import Directory, OpenDirectory
from januslens_server.access.quotas import QuotaBook
from januslens_server.rpc.admin import AdminService
from januslens_server.rpc.authentication import Authentication
from januslens_server.rpc.call import ADMIN_NAME, SERVICE_NAME, create_series
from januslens_server.rpc.health import Health
from januslens_server.rpc.options import PeerLimits, server_options
from januslens_server.rpc.service import IntrospectionService
from januslens_server.rpc.wire import WireFormat

# gRPC logs the exceptions that its handlers end with under this name.
GRPC_LOGGER = "grpc._cython.cygrpc"

# Version 1 of reflection has the messages of v1alpha under another service name, which grpcio does
# not register. Newer tools ask for it first.
REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"

PACKAGE = __name__.partition(".")[0] + "."

logger = logging.getLogger(__name__)


def drop_failed_writes(record: logging.LogRecord) -> bool:
    """Log gRPC's failures to write to a disconnected peer as DEBUG instead of ERROR.

    Any peer can cause such failures at any rate. gRPC writes unary responses and final statuses
    after our handlers have returned, so the handlers cannot catch the errors. Errors with a frame
    of this package in their traceback are still logged as ERROR.
    """
    error = record.exc_info[1] if record.exc_info else None
    if not isinstance(error, grpc.aio.InternalError) or _is_ours(error):
        return True
    logger.debug("gRPC could not write to a peer: %s", error)
    return False


def _is_ours(error: BaseException) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith(PACKAGE) for frame, _ in frames)


def build_server(
    service: IntrospectionService,
    health_service: Health,
    max_connection_age: float | None = None,
    directory: Directory | None = None,
    quotas: QuotaBook | None = None,
    *,
    admin: AdminService | None = None,
    share_port: bool = False,
    peers: PeerLimits | None = None,
) -> grpc.aio.Server:
    """Build a server with introspection, health and reflection, which does not listen yet.

    Connections older than `max_connection_age` seconds accept no new calls and finish running ones.
    `directory` finds callers by token, and `quotas` tracks their usage; without them, all callers
    may call everything. `admin`, if given, changes the models. With `share_port`, several processes
    of one user can listen on the same port.
    """
    create_series()
    logging.getLogger(GRPC_LOGGER).addFilter(drop_failed_writes)
    options = server_options(peers, share_port=share_port)
    if max_connection_age is not None:
        options.append(("grpc.max_connection_age_ms", round(1000 * max_connection_age)))
    authentication = Authentication(directory or OpenDirectory(), quotas or QuotaBook())
    interceptors = [authentication, WireFormat()]
    server = grpc.aio.server(interceptors=interceptors, options=options)
    service_pb2_grpc.add_IntrospectionServiceServicer_to_server(service, server)
    if admin is not None:
        admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, server)
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    _enable_reflection(server)
    return server


def _enable_reflection(server: grpc.aio.Server) -> None:
    """Register the services' descriptions under both versions of the reflection protocol."""
    names = (SERVICE_NAME, ADMIN_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME, REFLECTION_V1)
    reflection.enable_server_reflection(names, server)
    handler = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = {"ServerReflectionInfo": handler}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(REFLECTION_V1, handlers),)
    )
