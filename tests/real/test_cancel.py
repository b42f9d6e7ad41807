"""Cancelling one long forward pass frees the device within a layer."""

from __future__ import annotations

import time

import grpc
import pytest

from januslens.v1 import service_pb2_grpc, trace_pb2
from tests.real.checkpoints import GEMMA
from tests.real.test_memory import START_SECONDS, request
from tests.support.calls import prompt
from tests.support.server import running_server

pytestmark = pytest.mark.real

TOKENS = 9000
Stub = service_pb2_grpc.IntrospectionServiceStub


def test_cancelled_pass_of_9000_tokens_lets_the_next_request_run() -> None:
    flags = ["--model", f"gemma3={GEMMA}", "--max-request-seconds", "3600"]
    small = trace_pb2.TraceRequest(
        input=prompt("Lionel Messi"), node_kinds=[trace_pb2.NODE_KIND_BLOCK_OUTPUT]
    )
    with (
        running_server(*flags, seconds=START_SECONDS) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = Stub(channel)
        list(stub.Trace(small))
        started = time.monotonic()
        list(stub.Trace(small))
        alone = time.monotonic() - started
        waits = []
        for seconds in (2.0, 5.0, 9.0):  # into the pass: attention, MLP, whichever runs then
            stream = stub.Trace(request(TOKENS), timeout=600)
            time.sleep(seconds)
            assert stream.is_active()
            stream.cancel()
            started = time.monotonic()
            list(stub.Trace(small, timeout=600))
            waits.append(time.monotonic() - started - alone)
        shown = ", ".join(f"{wait:.2f}" for wait in waits)
        print(
            f"\nseconds from cancelling until the next trace began: {shown} (it takes {alone:.2f})"
        )
        assert max(waits) < 10
