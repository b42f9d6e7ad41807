"""On SIGTERM running requests finish, new ones are refused, and the exit status is 0."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from januslens.v1 import models_pb2, service_pb2_grpc, trace_pb2
from tests.support.calls import long_trace, prompt, refused, started
from tests.support.metrics import wait_until_idle
from tests.support.model_folders import slow_to_load
from tests.support.server import ServerProcess, running_server

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def watch(channel: grpc.Channel, service: str) -> Iterator[Any]:
    health: Any = health_pb2_grpc.HealthStub(channel)
    for answer in health.Watch(health_pb2.HealthCheckRequest(service=service)):
        yield answer.status


def test_a_stream_in_flight_is_finished_while_new_calls_are_refused() -> None:
    with running_server() as server, grpc.insecure_channel(server.address) as channel:
        states = watch(channel, "januslens.ready")
        assert next(states) == SERVING
        stream = started(channel, "Trace", long_trace(2))
        messages = [next(stream)]
        server.process.terminate()
        assert next(states) == NOT_SERVING
        assert_refuses_new(channel)
        # All results are computed, and wait for a slow reader.
        wait_until_idle(server)
        time.sleep(1.5)
        messages += stream
        assert messages[-1].HasField("summary")
        assert stream.code() is grpc.StatusCode.OK
        assert server.process.wait(timeout=10) == 0
    assert "drained" in server.log
    assert "Traceback" not in server.log


def assert_refuses_new(channel: grpc.Channel) -> None:
    requests = {
        "Trace": trace_pb2.TraceRequest(input=prompt("Japan")),
        "Tokenize": models_pb2.TokenizeRequest(text="Japan"),
    }
    for method, request in requests.items():
        answer = refused(channel, method, request)
        assert answer.code is grpc.StatusCode.UNAVAILABLE
        assert (answer.reason, answer.info.domain) == ("SERVER_DRAINING", "januslens")
        assert answer.retry_after is not None


def test_requests_beyond_the_grace_period_are_aborted() -> None:
    with (
        running_server("--grace-seconds", "0.5") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        states = watch(channel, "")  # an open watch must not delay the server
        assert next(states) == SERVING
        stream = started(channel, "Trace", long_trace(40))
        next(stream)
        server.process.terminate()
        with pytest.raises(grpc.RpcError):
            list(stream)
        assert server.process.wait(timeout=30) == 0
        assert stream.code() is grpc.StatusCode.UNAVAILABLE
    assert "grace period over" in server.log
    assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def loading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose only model takes many seconds to load."""
    folder = slow_to_load(tmp_path_factory.mktemp("models") / "slow")
    with running_server("--model", f"slow={folder}", until="serving on") as server:
        yield server


def test_a_loading_model_is_unavailable(loading: ServerProcess) -> None:
    with grpc.insecure_channel(loading.address) as channel:
        requests = {
            "Trace": trace_pb2.TraceRequest(input=prompt("Japan")),
            "Tokenize": models_pb2.TokenizeRequest(model="slow", text="Japan"),
        }
        for method, request in requests.items():
            answer = refused(channel, method, request)
            assert answer.code is grpc.StatusCode.UNAVAILABLE
            assert (answer.reason, answer.info.domain) == ("MODEL_LOADING", "januslens")
            assert answer.retry_after is not None
            assert answer.text == "model 'slow' is still loading"


def test_unavailable_calls_can_be_repeated_elsewhere(loading: ServerProcess) -> None:
    """gRPC repeats calls that ended without headers, after the delay in the trailers."""
    with grpc.insecure_channel(loading.address) as channel:
        request = models_pb2.TokenizeRequest(text="Japan")
        call = started(channel, "Tokenize", request, metadata=(("x-request-id", "again-1"),))
        assert call.exception() is not None
        assert "x-request-id" not in dict(call.initial_metadata() or ())
        trailers = dict(call.trailing_metadata())
        assert (trailers["x-request-id"], trailers["grpc-retry-pushback-ms"]) == ("again-1", "1000")


def test_a_loading_server_is_alive_but_not_ready(loading: ServerProcess) -> None:
    with grpc.insecure_channel(loading.address) as channel:
        stub = service_pb2_grpc.IntrospectionServiceStub(channel)
        (model,) = stub.ListModels(models_pb2.ListModelsRequest()).models
        assert (model.name, model.state) == ("slow", models_pb2.Model.STATE_LOADING)
        states = {name: next(watch(channel, name)) for name in ("", "januslens.ready", "slow")}
        assert states == {"": SERVING, "januslens.ready": NOT_SERVING, "slow": NOT_SERVING}


def test_a_loading_server_stops_at_once(loading: ServerProcess) -> None:
    began = time.monotonic()
    loading.process.terminate()
    assert loading.process.wait(timeout=10) == 0
    assert time.monotonic() - began < 8  # loading takes much longer
    assert "Traceback" not in loading.log
