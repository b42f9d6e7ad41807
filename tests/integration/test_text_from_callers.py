"""Texts of callers open no files, forge no log lines and create no metric labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from google.protobuf.message import Message

from januslens.v1 import common_pb2, models_pb2, trace_pb2
from tests.support.calls import REQUEST_ID, prompt, refused, started
from tests.support.server import ServerProcess, running_server

MARK = "callers-own-words"
FORGED = f"x\n2026-01-01T00:00:00Z INFO januslens_server: {MARK}\r\n\x1b[2J"
PATHS = ["../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "~/.ssh/id_rsa", "org/model@main"]


@pytest.fixture(scope="module", params=["text", "json"])
def server(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    with running_server("--log-format", request.param, "--log-level", "debug") as process:
        yield process


@pytest.fixture
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.mark.parametrize("name", [*PATHS, FORGED])
def test_a_models_name_is_only_looked_up(channel: grpc.Channel, name: str) -> None:
    answer = refused(channel, "Tokenize", models_pb2.TokenizeRequest(model=name, text="a"))
    assert answer.code is grpc.StatusCode.NOT_FOUND
    assert answer.text == f"unknown model {name!r}: expected one of demo"


def test_texts_of_callers_appear_in_neither_log_nor_metrics(
    server: ServerProcess, channel: grpc.Channel
) -> None:
    target = common_pb2.Target(text=FORGED)
    requests: dict[str, list[Message]] = {
        "Tokenize": [
            models_pb2.TokenizeRequest(model=FORGED, text=FORGED),
            models_pb2.TokenizeRequest(text=FORGED),
        ],
        "ListModels": [models_pb2.ListModelsRequest(page_token=FORGED)],
        "Trace": [
            trace_pb2.TraceRequest(input=prompt(FORGED), layers=[0], target=target),
            trace_pb2.TraceRequest(model=FORGED, revision=FORGED, input=prompt(FORGED)),
        ],
    }
    for method, messages in requests.items():
        for message in messages:
            metadata = ((REQUEST_ID, MARK + " x"), ("authorization", f"Bearer {MARK}"))
            call = started(channel, method, message, metadata=metadata, timeout=30)
            assert call.code() is not grpc.StatusCode.INTERNAL
    unknown: Any = channel.unary_unary(f"/januslens.v1.IntrospectionService/{MARK}")
    with pytest.raises(grpc.RpcError):
        unknown(b"", timeout=30)
    refused(channel, "Tokenize", models_pb2.TokenizeRequest(), request_id="the-last-one")
    server.wait_for("the-last-one")
    assert MARK not in server.log
    with urlopen(server.metrics_url, timeout=10) as page:  # noqa: S310 - the server's own
        assert MARK not in page.read().decode()
