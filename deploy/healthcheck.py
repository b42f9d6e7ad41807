"""The image's health check: ends with 0 if the server of this container is ready, else with 1.

It finds the server as the server itself does, from environment and configuration file; flags
given to the server are out of its sight. Where the server speaks TLS it asks the health port.
"""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from januslens_server.config import read_settings
from januslens_server.rpc.health import READY

TIMEOUT_SECONDS = 5


def main() -> None:
    """Ask for `januslens.ready`; an answer other than SERVING is printed."""
    settings = read_settings([])
    encrypted = settings.tls_certificate is not None
    if encrypted and settings.health_port is None:
        raise SystemExit("expected a health_port beside TLS; without one nobody can check")
    port = settings.port if settings.health_port is None else settings.health_port
    address = f"{settings.host}:{port}"
    request = health_pb2.HealthCheckRequest(service=READY)
    # A proxy from the environment is for model downloads, not for our own port.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer: health_pb2.HealthCheckResponse = stub.Check(  # type: ignore[attr-defined]  # untyped
                request, timeout=TIMEOUT_SECONDS
            )
        except grpc.RpcError as error:
            raise SystemExit(f"{address}: {error.code().name}: {error.details()}") from error
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        state = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        raise SystemExit(f"{address}: {READY} is {state}")


if __name__ == "__main__":
    main()
