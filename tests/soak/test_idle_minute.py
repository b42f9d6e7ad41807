"""A client that pings every ten seconds keeps its connection through a minute without calls."""

from __future__ import annotations

import threading

import grpc

from januslens.v1 import models_pb2, service_pb2_grpc
from tests.support.server import ServerProcess

IDLE_SECONDS = 65
KEEPALIVE = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)


def test_an_idle_connection_survives_its_own_pings(soaked: ServerProcess) -> None:
    """A server that rejects pings sends GOAWAY, too_many_pings, and the channel reconnects."""
    states: list[grpc.ChannelConnectivity] = []
    with grpc.insecure_channel(soaked.address, KEEPALIVE) as channel:
        stub = service_pb2_grpc.IntrospectionServiceStub(channel)
        stub.ListModels(models_pb2.ListModelsRequest(), timeout=10)
        channel.subscribe(states.append)
        threading.Event().wait(IDLE_SECONDS)
        assert set(states) == {grpc.ChannelConnectivity.READY}
        stub.ListModels(models_pb2.ListModelsRequest(), timeout=10)
    assert "too_many_pings" not in soaked.log
