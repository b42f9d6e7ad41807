"""The metrics page: the documented names, counted by method and status alone."""

from __future__ import annotations

import grpc

from januslens.v1 import models_pb2, trace_pb2
from tests.support.calls import methods, prompt, refused, started
from tests.support.metrics import page, sample
from tests.support.server import ServerProcess

DOCUMENTED = {
    "grpc_server_started": "counter",
    "grpc_server_handled": "counter",
    "grpc_server_handling_seconds": "histogram",
    "januslens_requests_unfinished": "gauge",
    "januslens_model_ready": "gauge",
    "process_resident_memory_bytes": "gauge",
}


def test_the_documented_names_are_there(server: ServerProcess) -> None:
    types = {family.name: family.type for family in page(server)}
    assert types.items() >= DOCUMENTED.items()


def test_a_ready_model_is_1(server: ServerProcess) -> None:
    assert sample(server, "januslens_model_ready", model="demo") == 1.0


def test_calls_are_counted_by_method_and_status(
    server: ServerProcess, channel: grpc.Channel
) -> None:
    def counts() -> tuple[float, float, float]:
        labels = {"grpc_method": "Tokenize", "grpc_code": "NOT_FOUND"}
        return (
            sample(server, "grpc_server_started_total", grpc_method="Tokenize"),
            sample(server, "grpc_server_handled_total", **labels),
            sample(server, "grpc_server_handling_seconds_count", grpc_method="Tokenize"),
        )

    before = counts()
    refused(channel, "Tokenize", models_pb2.TokenizeRequest(model="nobody", text="x"))
    assert counts() == tuple(count + 1 for count in before)


def test_no_text_of_a_caller_becomes_a_label(server: ServerProcess, channel: grpc.Channel) -> None:
    """Each new label value is a series for good: callers must not be able to make them."""
    refused(channel, "Tokenize", models_pb2.TokenizeRequest(model="mallory-1", text="mallory-2"))
    request = trace_pb2.TraceRequest(input=prompt("Japan"), layers=[0])
    list(started(channel, "Trace", request, metadata=(("x-request-id", "mallory-3"),)))
    samples = [found for family in page(server) for found in family.samples]
    assert not any("mallory" in str(found) for found in samples)
    named = {found.labels["grpc_method"] for found in samples if "grpc_method" in found.labels}
    assert named <= set(methods()) | {"Check", "Watch"}
