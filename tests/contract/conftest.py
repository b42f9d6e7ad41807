"""A raw connection to the session's server."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from januslens.v1 import models_pb2, service_pb2_grpc


@pytest.fixture(scope="session")
def channel(server_address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server_address) as channel:
        yield channel


@pytest.fixture(scope="session")
def stub(channel: grpc.Channel) -> service_pb2_grpc.IntrospectionServiceStub:
    return service_pb2_grpc.IntrospectionServiceStub(channel)


@pytest.fixture(scope="session")
def demo(stub: service_pb2_grpc.IntrospectionServiceStub) -> models_pb2.Model:
    """The embedded model as ListModels describes it."""
    (model,) = stub.ListModels(models_pb2.ListModelsRequest()).models
    return model
