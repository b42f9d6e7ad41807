"""The image's health check: exits with 0 if the server of this container is ready, else with 1.

It reads the server's address from the environment and the settings file, not from flags. If the
server uses TLS, it checks the health port.
"""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from januslens_server.config import read_settings
from januslens_server.rpc.health import READY

TIMEOUT_SECONDS = 5


def main() -> None:
    """Check `januslens.ready`; print any status other than SERVING."""
    settings = read_settings([])
    encrypted = settings.tls_certificate is not None
    if encrypted and settings.health_port is None:
        raise SystemExit("TLS requires a health_port for health checks; set JANUSLENS_HEALTH_PORT")
    port = settings.port if settings.health_port is None else settings.health_port
    address = f"{settings.host}:{port}"
    request = health_pb2.HealthCheckRequest(service=READY)
    # Ignore proxy variables: they are for model downloads.
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
