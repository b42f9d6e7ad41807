"""Test the rows of the error table that a healthy server can produce, and the common details."""

from __future__ import annotations

import re
import time
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from januslens.v1 import (
    activations_pb2,
    cost_pb2,
    edits_pb2,
    gradient_lens_pb2,
    intervene_pb2,
    lens_pb2,
    models_pb2,
    neurons_pb2,
    service_pb2_grpc,
    trace_pb2,
)
from tests.support.calls import (
    REQUEST_ID,
    SERVICE,
    long_trace,
    methods,
    prompt,
    refusal,
    refused,
    started,
)
from tests.support.server import ServerProcess

Stub = service_pb2_grpc.IntrospectionServiceStub

NAMING_A_MODEL: list[tuple[str, Message]] = [
    ("GetModel", models_pb2.GetModelRequest(model="nobody")),
    ("Tokenize", models_pb2.TokenizeRequest(model="nobody", text="x")),
    ("Project", lens_pb2.ProjectRequest(model="nobody")),
    ("Trace", trace_pb2.TraceRequest(model="nobody")),
    ("GradientLens", gradient_lens_pb2.GradientLensRequest(model="nobody")),
    ("PreviewEdit", edits_pb2.PreviewEditRequest(model="nobody")),
    ("Activations", activations_pb2.ActivationsRequest(model="nobody")),
    ("Intervene", intervene_pb2.InterveneRequest(model="nobody")),
    ("FindNeurons", neurons_pb2.FindNeuronsRequest(model="nobody")),
    (
        "EstimateCost",
        cost_pb2.EstimateCostRequest(trace=trace_pb2.TraceRequest(model="nobody")),
    ),
]

ASKING_FOR_A_REVISION: list[tuple[str, Message]] = [
    ("Trace", trace_pb2.TraceRequest(revision="main")),
    ("GradientLens", gradient_lens_pb2.GradientLensRequest(revision="main")),
    ("PreviewEdit", edits_pb2.PreviewEditRequest(revision="main")),
    ("Activations", activations_pb2.ActivationsRequest(revision="main")),
    ("Intervene", intervene_pb2.InterveneRequest(revision="main")),
    ("FindNeurons", neurons_pb2.FindNeuronsRequest(revision="main")),
    ("Tokenize", models_pb2.TokenizeRequest(revision="main", text="x")),
    ("Project", lens_pb2.ProjectRequest(revision="main")),
]

EMPTY_TEXT = models_pb2.TokenizeRequest()


@pytest.mark.parametrize(("method", "request_"), NAMING_A_MODEL, ids=lambda value: str(value)[:12])
def test_an_unknown_model_is_not_found(
    channel: grpc.Channel, method: str, request_: Message
) -> None:
    answer = refused(channel, method, request_)
    assert answer.code is grpc.StatusCode.NOT_FOUND
    assert (answer.reason, answer.info.domain) == ("MODEL_NOT_FOUND", "januslens")
    assert answer.text == "unknown model 'nobody': expected one of demo"
    assert (answer.fields, answer.retry_after) == ([], None)


@pytest.mark.parametrize(
    ("method", "request_"), ASKING_FOR_A_REVISION, ids=lambda value: str(value)[:12]
)
def test_another_revision_is_not_found(
    channel: grpc.Channel, demo: models_pb2.Model, method: str, request_: Message
) -> None:
    answer = refused(channel, method, request_)
    assert answer.code is grpc.StatusCode.NOT_FOUND
    assert answer.reason == "REVISION_NOT_FOUND"
    assert demo.provenance.revision in answer.text


def test_the_resident_revision_is_served(stub: Stub, demo: models_pb2.Model) -> None:
    request = trace_pb2.TraceRequest(
        model="demo", revision=demo.provenance.revision, input=prompt("Japan"), layers=[0]
    )
    header = next(iter(stub.Trace(request))).header
    assert header.provenance.revision == demo.provenance.revision


@pytest.mark.parametrize("seconds", [0.001, 0.5])
def test_a_deadline_ends_the_call_and_the_computation(
    channel: grpc.Channel, stub: Stub, seconds: float
) -> None:
    began = time.monotonic()
    call = started(channel, "Trace", long_trace(40), timeout=seconds)
    with pytest.raises(grpc.RpcError):
        list(call)
    assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    # The whole trace would take ten times as long, so the device was freed at once.
    list(stub.Trace(trace_pb2.TraceRequest(input=prompt("Japan"), layers=[0])))
    assert time.monotonic() - began < seconds + 10


@pytest.mark.parametrize("method", methods())
def test_malformed_message_is_refused_without_quoting_it(
    channel: grpc.Channel, method: str
) -> None:
    answer = refusal(raw_call(channel, method, b"\xff\xff\xff"))
    assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
    assert answer.reason == "INVALID_REQUEST"
    assert answer.text == f"request: message is not a valid {method} request"


def test_an_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    unknown: Any = channel.unary_unary(SERVICE + "Nope")
    call = unknown.future(b"", timeout=30)
    assert call.exception() is not None
    assert call.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "Nope" not in (call.details() or "")


def test_a_request_over_the_size_limit_is_refused(channel: grpc.Channel) -> None:
    request = models_pb2.TokenizeRequest(text="x" * 5 * 2**20)
    assert refused(channel, "Tokenize", request).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused(channel, "Tokenize", EMPTY_TEXT).reason == "INVALID_REQUEST"


@pytest.mark.parametrize("request_id", ["a", "job-7:retry.2_x", "A" * 128])
def test_a_request_id_is_echoed_in_header_and_error(channel: grpc.Channel, request_id: str) -> None:
    answer = refused(channel, "Tokenize", EMPTY_TEXT, request_id=request_id)
    assert answer.request_id == request_id
    assert answer.info.metadata == {"request_id": request_id}


@pytest.mark.parametrize(
    "request_id", ["", "A" * 129, "two words", "line%0abreak", "<script>", "a/b", "x;y"]
)
def test_an_unsafe_request_id_is_replaced(channel: grpc.Channel, request_id: str) -> None:
    """The id is written to logs and pages."""
    answer = refused(channel, "Tokenize", EMPTY_TEXT, request_id=request_id)
    assert answer.request_id is not None
    assert re.fullmatch("[0-9a-f]{32}", answer.request_id)
    assert answer.info.metadata == {"request_id": answer.request_id}


def test_every_call_without_an_id_gets_one_of_its_own(channel: grpc.Channel) -> None:
    ids = {refused(channel, "Tokenize", EMPTY_TEXT).request_id for _ in range(5)}
    assert len(ids) == 5
    assert None not in ids


def test_a_stream_carries_the_id_in_header_and_first_message(channel: grpc.Channel) -> None:
    request = trace_pb2.TraceRequest(input=prompt("Japan"), layers=[0])
    call = started(channel, "Trace", request, metadata=((REQUEST_ID, "stream-1"),))
    assert next(iter(call)).header.request_id == "stream-1"
    assert dict(call.initial_metadata())[REQUEST_ID] == "stream-1"
    call.cancel()


def test_successful_call_returns_its_request_id(channel: grpc.Channel) -> None:
    call = started(
        channel, "ListModels", models_pb2.ListModelsRequest(), metadata=((REQUEST_ID, "ok-1"),)
    )
    assert call.result().models
    assert dict(call.initial_metadata())[REQUEST_ID] == "ok-1"


def test_the_log_names_the_call_and_no_prompt(channel: grpc.Channel, server: ServerProcess) -> None:
    request = trace_pb2.TraceRequest(input=prompt("Japan secretly"), positions=[99])
    refused(channel, "Trace", request, request_id="logged-1")
    server.wait_for("Trace INVALID_ARGUMENT id=logged-1 caller=127.0.0.1 ")
    assert "secretly" not in server.log


def raw_call(channel: grpc.Channel, method: str, request: bytes) -> Any:
    """Make a call with raw bytes that must fail, and wait until it ends."""
    method_of: Any = (
        channel.unary_stream if methods()[method].server_streaming else channel.unary_unary
    )
    raw = method_of(SERVICE + method)
    if methods()[method].server_streaming:
        stream = raw(request, timeout=30)
        with pytest.raises(grpc.RpcError):
            next(stream)
        return stream
    call = raw.future(request, timeout=30)
    assert call.exception() is not None
    return call
