"""A raw connection to the session's server."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from januslens.v1 import service_pb2_grpc


@pytest.fixture
def channel(server_address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server_address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> service_pb2_grpc.IntrospectionServiceStub:
    return service_pb2_grpc.IntrospectionServiceStub(channel)
