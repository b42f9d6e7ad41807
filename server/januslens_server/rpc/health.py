"""grpc.health.v1: alive, ready, and one service name per model."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from januslens_server import telemetry
from januslens_server.results import ModelState, ModelStatus
from januslens_server.rpc.options import server_options

ALIVE = ""
READY = "januslens.ready"

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Keeps the health service in step with the models' states."""

    def __init__(self) -> None:
        self.servicer = health_aio.HealthServicer()
        self._draining = False

    async def update(self, statuses: Sequence[ModelStatus]) -> None:
        """Ready: every configured model is READY or FAILED, and at least one is READY."""
        await self.servicer.set(ALIVE, SERVING)
        for status in statuses:
            serving = status.state is ModelState.READY
            await self.servicer.set(status.name, SERVING if serving else NOT_SERVING)
        ready = is_ready(statuses)
        await self.servicer.set(READY, SERVING if ready else NOT_SERVING)
        telemetry.READY.set(ready and not self._draining)

    async def drain(self) -> None:
        """Say NOT_SERVING from now on, whatever the models' states become.

        Also of a server whose device is lost: only a new process can serve again.
        """
        self._draining = True
        telemetry.READY.set(0)
        await self.servicer.enter_graceful_shutdown()


def is_ready(statuses: Sequence[ModelStatus]) -> bool:
    """Whether nothing loads any more and something can be served."""
    states = {status.state for status in statuses}
    return ModelState.READY in states and ModelState.LOADING not in states


def build_health_server(health_service: Health) -> grpc.aio.Server:
    """Health alone, for who asks in plaintext; not yet listening."""
    server = grpc.aio.server(options=server_options())
    health_pb2_grpc.add_HealthServicer_to_server(health_service.servicer, server)
    return server
