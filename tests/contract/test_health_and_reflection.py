"""Test grpc.health.v1 and server reflection."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from tests.support.calls import methods

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("service", ["", "januslens.ready", "januslens.all-ready", "demo"])
def test_a_ready_server_is_serving(channel: grpc.Channel, service: str) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    assert stub.Check(health_pb2.HealthCheckRequest(service=service)).status == SERVING
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=service))
    assert next(watch).status == SERVING
    watch.cancel()


def test_health_knows_no_other_service(channel: grpc.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    call = stub.Check.future(health_pb2.HealthCheckRequest(service="nobody"))
    assert call.exception() is not None
    assert call.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_shows_every_service_and_method(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert set(database.get_services()) >= {
        "januslens.v1.IntrospectionService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "grpc.reflection.v1.ServerReflection",
    }
    file = database.FindFileContainingSymbol("januslens.v1.IntrospectionService")
    (service,) = file.service
    assert {method.name for method in service.method} == set(methods())
    assert "januslens/v1/trace.proto" in file.dependency


def test_version_1_of_reflection_answers_like_v1alpha(channel: grpc.Channel) -> None:
    asked = reflection_pb2.ServerReflectionRequest(file_by_filename="januslens/v1/trace.proto")
    answers = []
    for version in ("v1", "v1alpha"):
        method = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
        call = channel.stream_stream(
            method,
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        (answer,) = call(iter([asked]))
        answers.append(list(answer.file_descriptor_response.file_descriptor_proto))
    assert answers[0] == answers[1]
    assert answers[0]
