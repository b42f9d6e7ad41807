"""Connections end at their maximum age, so that balancing clients find new servers."""

from __future__ import annotations

import queue
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from januslens.v1 import models_pb2
from tests.support.calls import started
from tests.support.server import running_server

# gRPC varies ages by a tenth, so that connections opened together do not end together.
AGE, LATEST = 1.0, 5.0


def test_an_old_connection_accepts_no_calls_and_finishes_running_ones() -> None:
    with (
        running_server("--max-connection-age-seconds", str(AGE)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="januslens.ready"))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING

        states: queue.SimpleQueue[grpc.ChannelConnectivity] = queue.SimpleQueue()
        channel.subscribe(states.put)
        while states.get(timeout=LATEST) is not grpc.ChannelConnectivity.IDLE:
            pass
        assert watch.is_active()
        answer = started(channel, "ListModels", models_pb2.ListModelsRequest()).result(timeout=10)
        assert answer.models[0].name == "demo"
        assert watch.is_active()
        watch.cancel()
