"""Requests that wait report their place, and leave the queue at once when they end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from click.testing import CliRunner

import januslens
from januslens.cli.program import januslens as command
from januslens.v1 import trace_pb2
from tests.support.calls import long_sweep, prompt, started, timeless
from tests.support.metrics import unfinished, wait_until_idle
from tests.support.server import ServerProcess

REPORT = (("x-report-waiting", "true"),)
SHORT = trace_pb2.TraceRequest(input=prompt("Japan"), layers=[0])


@pytest.fixture
def running(server: ServerProcess, channel: grpc.Channel) -> Iterator[Any]:
    """A request of many seconds, which is read as it arrives and so keeps the device busy."""
    wait_until_idle(server)
    call = started(channel, "Intervene", long_sweep())
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


def test_a_waiting_stream_reports_its_place_on_demand(channel: grpc.Channel, running: Any) -> None:
    reporting = started(channel, "Trace", SHORT, metadata=REPORT, timeout=60)
    silent = started(channel, "Trace", SHORT, timeout=60)
    first, second = next(reporting), next(reporting)
    for message in (first, second):
        assert message.WhichOneof("event") == "waiting"
        assert message.sequence == 0
        assert message.waiting.requests_ahead == 1
        assert message.waiting.expected_seconds > 0
    waited = [message.waiting.waited_seconds for message in (first, second)]
    assert 0.5 <= waited[0] < 1.5 <= waited[1]
    running.cancel()
    rest = [message for message in reporting if message.WhichOneof("event") != "waiting"]
    expected = [timeless(message) for message in silent]
    assert [timeless(message) for message in rest] == expected
    assert rest[0].HasField("header")


def test_the_client_passes_the_place_on(server: ServerProcess, running: Any) -> None:
    places: list[januslens.Waiting] = []
    stop = threading.Timer(1.2, running.cancel)
    with januslens.Client(server.address, on_waiting=places.append, timeout=60) as client:
        stop.start()
        waited = client.trace("Japan", layers=[0])
        alone = client.trace("Japan", layers=[0])
    assert places[0].requests_ahead == 1
    assert waited.layers == alone.layers


def test_the_command_shows_the_place(server: ServerProcess, running: Any) -> None:
    threading.Timer(1.2, running.cancel).start()
    arguments = ["trace", "Japan", "--json", "--server", server.address]
    shown = CliRunner().invoke(command, arguments)
    assert shown.exit_code == 0
    assert shown.stderr.startswith("waiting: 1 request ahead, about ")
    assert shown.stderr.count("waiting") == 1
    assert "waiting" not in shown.stdout
