"""Requests that end while they wait leave the queue at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from januslens.v1 import trace_pb2
from tests.support.calls import long_trace, prompt, started
from tests.support.metrics import unfinished, wait_until_idle
from tests.support.server import ServerProcess

SHORT = trace_pb2.TraceRequest(input=prompt("Japan"), layers=[0])


@pytest.fixture
def running(server: ServerProcess, channel: grpc.Channel) -> Iterator[Any]:
    """A trace of many seconds, which is read as it arrives and so keeps the device busy."""
    wait_until_idle(server)
    call = started(channel, "Trace", long_trace(60))
    next(call)
    reader = threading.Thread(target=_read, args=(call,))
    reader.start()
    yield call
    call.cancel()
    reader.join()
    wait_until_idle(server)


def _read(call: Any) -> None:
    try:
        for _ in call:
            pass
    except grpc.RpcError:
        pass  # it is cancelled at the end


def wait_for_unfinished(server: ServerProcess, count: int) -> None:
    deadline = time.monotonic() + 30
    while (found := unfinished(server)) != count:
        assert time.monotonic() < deadline, f"expected {count} unfinished, got {found:g}"
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_request_that_ends_while_it_waits_leaves_the_queue_at_once(
    server: ServerProcess, channel: grpc.Channel, running: Any, how: str
) -> None:
    timeout = 4 if how == "deadline" else None
    waiting = [started(channel, "Trace", SHORT, timeout=timeout) for _ in range(5)]
    wait_for_unfinished(server, 6)
    if how == "cancel":
        for call in waiting:
            call.cancel()
    wait_for_unfinished(server, 1)
    assert running.is_active()  # the device has been busy all the time
    expected = grpc.StatusCode.CANCELLED if how == "cancel" else grpc.StatusCode.DEADLINE_EXCEEDED
    assert {call.code() for call in waiting} == {expected}
