"""Every call logs one line with its sizes and times, without its prompt by default."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from januslens.v1 import common_pb2, gradient_lens_pb2, lens_pb2, models_pb2, trace_pb2
from tests.support.calls import REQUEST_ID, methods, prompt, refused, started
from tests.support.server import ServerProcess, running_server

TRACE = trace_pb2.TraceRequest(input=prompt("The capital of Japan"), layers=[0, 1])


@pytest.fixture(scope="module", params=[False, True], ids=["discreet", "prompts"])
def logging_server(request: pytest.FixtureRequest) -> Iterator[tuple[ServerProcess, bool]]:
    flags = ["--log-prompts"] if request.param else []
    with running_server("--log-format", "json", *flags) as server:
        yield server, request.param


def line_of(server: ServerProcess, request_id: str) -> dict[str, Any]:
    server.wait_for(f'"id": "{request_id}"')
    (line,) = [line for line in server.lines if f'"id": "{request_id}"' in line]
    found: dict[str, Any] = json.loads(line)
    return found


def asked(address: str, method: str, request: Any, request_id: str) -> list[Any]:
    with grpc.insecure_channel(address) as channel:
        call = started(channel, method, request, metadata=((REQUEST_ID, request_id),))
        return list(call) if methods()[method].server_streaming else [call.result()]


def test_a_trace_logs_one_line_with_sizes_and_times(
    logging_server: tuple[ServerProcess, bool],
) -> None:
    server, prompts = logging_server
    answers = asked(server.address, "Trace", TRACE, "trace-1")
    line, summary = line_of(server, "trace-1"), answers[-1].summary
    expected = {
        "message": "Trace OK",
        "level": "info",
        "caller": "127.0.0.1",
        "model": "demo",
        "method": "Trace",
        "status": "OK",
        "tokens": len(answers[0].header.prompt_tokens),
        "nodes": summary.nodes,
        "edges": summary.edges,
        "messages": len(answers),
        "bytes": sum(answer.ByteSize() for answer in answers),
    }
    assert line.items() >= expected.items()
    assert line["stages"].keys() == {time.stage for time in summary.times}
    assert 0 <= line["queue_seconds"] < line["seconds"]
    on_device = [seconds for stage, seconds in line["stages"].items() if stage != "tokenize"]
    assert sum(on_device) <= line["device_seconds"] <= line["seconds"]
    assert (line.get("prompt") == "The capital of Japan") is prompts
    assert ("capital" in server.log) is prompts


def test_every_other_method_logs_one_line_with_sizes(
    logging_server: tuple[ServerProcess, bool],
) -> None:
    server, _ = logging_server
    target = common_pb2.Target(text=" Paris")
    gradient = gradient_lens_pb2.GradientLensRequest(
        input=TRACE.input, nll=gradient_lens_pb2.NegativeLogLikelihood(target=target)
    )
    vectors = common_pb2.Tensor(
        data_type=common_pb2.DATA_TYPE_FLOAT32, shape=[3, 128], data=b"\x00\x00\x80?" * 384
    )
    calls: dict[str, tuple[Any, dict[str, Any]]] = {
        "GradientLens": (gradient, {"tokens": 4, "matrices": 8}),
        "Project": (lens_pb2.ProjectRequest(vectors=vectors), {"vectors": 3}),
        "Tokenize": (models_pb2.TokenizeRequest(text="The capital"), {"tokens": 2}),
        "ListModels": (models_pb2.ListModelsRequest(), {"messages": 1}),
    }
    for method, (request, sizes) in calls.items():
        answers = asked(server.address, method, request, f"other-{method}")
        line = line_of(server, f"other-{method}")
        sent = {"status": "OK", "bytes": sum(answer.ByteSize() for answer in answers)}
        assert line.items() >= (sizes | sent).items()


def test_a_refused_call_logs_its_reason_without_its_texts(
    logging_server: tuple[ServerProcess, bool],
) -> None:
    server, _ = logging_server
    request = trace_pb2.TraceRequest(model="mallory\nforged", input=prompt("x"))
    with grpc.insecure_channel(server.address) as channel:
        refused(channel, "Trace", request, request_id="refused-1")
    line = line_of(server, "refused-1")
    assert (line["status"], line["reason"]) == ("NOT_FOUND", "MODEL_NOT_FOUND")
    assert "model" not in line
    assert "mallory" not in server.log
    assert all(isinstance(json.loads(line), dict) for line in server.lines)
