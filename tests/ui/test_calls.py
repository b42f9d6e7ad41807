"""RPCs over HTTP: the page receives the same messages as the Python client."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
from google.protobuf.message import Message

from januslens import Client, read_gradient, read_trace
from januslens.v1 import common_pb2, edits_pb2, gradient_lens_pb2, models_pb2, trace_pb2
from tests.support.calls import long_sweep, long_trace, prompt
from tests.support.metrics import rpc_labels, sample, unfinished, wait_until_idle
from tests.support.server import ServerProcess
from tests.support.ui import TOKEN, LivePage, live_page

PROMPT = "The capital of Japan is the city of"
TRACE = trace_pb2.TraceRequest(input=prompt(PROMPT))
PARIS = common_pb2.Target(text=" Paris")
GRADIENT = gradient_lens_pb2.GradientLensRequest(
    input=prompt(PROMPT), nll=gradient_lens_pb2.NegativeLogLikelihood(target=PARIS)
)


def cancelled(server: ServerProcess) -> float:
    return sample(server, "grpc_server_handled_total", **rpc_labels("Trace"), grpc_code="CANCELLED")


def test_trace_lines_equal_the_client_result(page: LivePage, server_address: str) -> None:
    lines = map(json.dumps, page.lines("Trace", TRACE))
    with Client(server_address) as client:
        assert read_trace(lines).layers == client.trace(PROMPT, logit_contribution=False).layers


def test_gradient_lines_equal_the_client_result(page: LivePage, server_address: str) -> None:
    lines = map(json.dumps, page.lines("GradientLens", GRADIENT))
    with Client(server_address) as client:
        assert read_gradient(lines).matrices == client.gradient_lens(PROMPT, " Paris").matrices


def test_unary_call_returns_one_line(page: LivePage) -> None:
    (models,) = page.lines("ListModels", models_pb2.ListModelsRequest())
    assert [model["name"] for model in models["models"]] == ["demo"]
    shift = edits_pb2.ForwardShift(layer=3, eta=0.15)
    request = edits_pb2.PreviewEditRequest(input=prompt(PROMPT), target=PARIS, shift=shift)
    (preview,) = page.lines("PreviewEdit", request)
    assert preview["edited"]["rankBefore"] > preview["edited"].get("rankAfter", 0) == 0


@pytest.mark.parametrize(
    ("method", "request_", "reason", "field"),
    [
        ("Trace", trace_pb2.TraceRequest(input=prompt(PROMPT), layers=[99]), "", "layers"),
        ("Trace", trace_pb2.TraceRequest(input=prompt(PROMPT), model="absent"), "MODEL", None),
        ("Tokenize", models_pb2.TokenizeRequest(), "", "text"),
    ],
)
def test_failed_call_ends_with_an_error_line(
    page: LivePage, method: str, request_: Message, reason: str, field: str | None
) -> None:
    (line,) = page.lines(method, request_)
    error = line["error"]
    assert error["message"]
    assert error["request_id"]
    assert error["reason"].startswith(reason)
    violated = [violation["field"] for violation in error["field_violations"]]
    assert violated == ([] if field is None else [field])


def test_unreachable_server_is_named_in_the_error() -> None:
    with live_page("127.0.0.1:1") as page:
        (line,) = page.lines("ListModels", models_pb2.ListModelsRequest())
    assert line["error"]["code"] == "UNAVAILABLE"
    assert "127.0.0.1:1" in line["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/api/Trace", "{", 400, "invalid JSON for TraceRequest"),
        ("/api/Trace", '"text"', 400, "invalid JSON for TraceRequest"),
        ("/api/Trace", b"\xff", 400, "invalid JSON for TraceRequest"),
        ("/api/Trace", '{"prompt": "x"}', 400, '"prompt"'),
        ("/api/Retrace", "{}", 404, "expected one of"),
    ],
)
def test_invalid_request_is_rejected(
    page: LivePage, path: str, body: str | bytes, status: int, text: str
) -> None:
    with page.request("POST", path, body, {TOKEN: page.token}) as response:
        assert response.status == status
        error: dict[str, Any] = json.load(response)["error"]
    assert text in error["message"]


def test_lines_arrive_while_the_server_computes(page: LivePage, server: ServerProcess) -> None:
    with page.call("Trace", long_trace(40)) as response:
        assert "header" in json.loads(response.readline())
        assert unfinished(server) == 1
    wait_until_idle(server)


def test_waiting_requests_have_lines_with_their_place(
    page: LivePage, server: ServerProcess
) -> None:
    with page.call("Intervene", long_sweep()) as running:
        running.readline()
        with page.call("Trace", TRACE) as response:
            place = json.loads(response.readline())["waiting"]
    wait_until_idle(server)
    assert place["requestsAhead"] == 1


def test_closing_the_connection_cancels_the_call(page: LivePage, server: ServerProcess) -> None:
    before = cancelled(server)
    with page.call("Trace", long_trace(40)) as response:
        response.readline()
    wait_until_idle(server)
    assert cancelled(server) == before + 1


def test_stopping_the_page_server_cancels_its_calls(server: ServerProcess) -> None:
    with live_page(server.address) as page, page.call("Trace", long_trace(40)) as response:
        response.readline()
        page.process.send_signal(signal.SIGINT)
        assert page.process.wait(timeout=20) == 130
    wait_until_idle(server)
