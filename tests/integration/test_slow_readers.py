"""Stalled readers use bounded memory, do not block the device, and are aborted in the end."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from januslens.v1 import models_pb2, service_pb2_grpc, trace_pb2
from januslens_server.pipelines.readings import _Unread
from januslens_server.results.trace import LayerGraph
from januslens_server.rpc.call import ERROR_SECONDS
from tests.support.calls import long_trace, prompt, refusal, refused, started
from tests.support.in_process import loaded, served
from tests.support.memory import resident_bytes
from tests.support.metrics import unfinished, wait_until_idle
from tests.support.server import ServerProcess, running_server

Stub = service_pb2_grpc.IntrospectionServiceStub

SHORT = trace_pb2.TraceRequest(input=prompt("Japan"), layers=[0])
# A stalled stream may hold its result buffer, gRPC's buffers and the trace's own activations.
MEMORY_OF_A_STALLED_STREAM = 100 * 2**20


@pytest.fixture
def stalled(channel: grpc.Channel, server: ServerProcess) -> Iterator[Any]:
    """A long stream that is no longer read."""
    wait_until_idle(server)
    call = started(channel, "Trace", long_trace(40))
    next(call)
    yield call
    call.cancel()
    wait_until_idle(server)


def test_other_callers_are_served_while_a_reader_stalls(
    server: ServerProcess, stub: Stub, stalled: Any
) -> None:
    """The device runs other requests after the stalled one is suspended."""
    for _ in range(3):
        assert list(stub.Trace(SHORT))[-1].HasField("summary")
    assert unfinished(server) == 1
    assert stalled.is_active()


def test_stalled_stream_uses_bounded_memory(
    server: ServerProcess, channel: grpc.Channel, stub: Stub
) -> None:
    list(stub.Trace(SHORT))
    before = resident_bytes(server.process.pid)
    call = started(channel, "Trace", long_trace(40))
    next(call)
    list(stub.Trace(SHORT))  # the long one is suspended now
    assert resident_bytes(server.process.pid) - before < MEMORY_OF_A_STALLED_STREAM
    call.cancel()
    wait_until_idle(server)


def test_a_reader_that_catches_up_gets_the_whole_stream(
    server: ServerProcess, channel: grpc.Channel, stub: Stub
) -> None:
    call = started(channel, "Trace", long_trace(5))
    first = next(call)
    list(stub.Trace(SHORT))  # it is suspended now, or has finished and waits for its reader
    sequences = [message.sequence for message in call]
    assert [first.sequence, *sequences] == list(range(len(sequences) + 1))
    assert call.code() is grpc.StatusCode.OK
    wait_until_idle(server)


@pytest.fixture(scope="module")
def impatient() -> Iterator[ServerProcess]:
    """A server with a short queue and a short stall limit."""
    with running_server("--max-waiting", "1", "--stall-seconds", "2") as process:
        yield process


def test_a_stalled_reader_is_aborted_with_the_reason(impatient: ServerProcess) -> None:
    with grpc.insecure_channel(impatient.address) as channel:
        call = started(channel, "Trace", long_trace(40))
        next(call)
        impatient.wait_for("Trace ABORTED")
        wait_until_idle(impatient)
        time.sleep(ERROR_SECONDS + 0.5)  # until the handler has ended without its reader
        with pytest.raises(grpc.RpcError):
            list(call)
    answer = refusal(call)
    assert answer.code is grpc.StatusCode.ABORTED
    assert (answer.reason, answer.info.domain) == ("READER_STALLED", "januslens")
    assert answer.retry_after is None
    assert "not read for 2 s" in answer.text


def results_in_memory() -> int:
    """The number of layers' results in this process, and of what reads their nodes' tokens."""
    gc.collect()  # earlier tests may have left some
    return sum(type(item) in {LayerGraph, _Unread} for item in gc.get_objects())


async def test_a_result_is_freed_while_its_messages_are_not_read() -> None:
    async with served(loaded()) as stub:
        before = results_in_memory()
        call = stub.Trace(long_trace(40))
        assert (await call.read()).HasField("header")
        assert (await call.read()).HasField("layer")
        # Megabytes of the first layer's messages are not read, so the next one is not computed.
        for _ in range(100):  # the request's thread may not have returned yet
            if results_in_memory() <= before:
                break
            await asyncio.sleep(0.1)
        assert results_in_memory() <= before
        call.cancel()


def test_unread_streams_beyond_the_limit_on_bytes_are_ended() -> None:
    """Each holds megabytes, and would until stalled readers are aborted after 60 s."""
    with (
        running_server("--max-unread", "16MiB") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        calls = [started(channel, "Trace", long_trace(40)) for _ in range(8)]
        server.wait_for("Trace ABORTED")
        served_within(channel, seconds=60)
        reasons = []
        for call in calls:
            with suppress(grpc.RpcError):
                list(call)
            if call.code() is not grpc.StatusCode.OK:
                assert "not read" in refusal(call).text
                reasons.append(refusal(call).reason)
        # Further streams of a caller with so many unread bytes are refused.
        assert "READER_STALLED" in reasons
        assert set(reasons) <= {"READER_STALLED", "QUEUE_FULL"}
        wait_until_idle(server)
        assert "Traceback" not in server.log


def served_within(channel: grpc.Channel, seconds: float) -> None:
    """Repeat a short request until it is no longer refused."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            assert list(Stub(channel).Trace(SHORT))[-1].HasField("summary")
        except grpc.RpcError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        else:
            return


def test_a_stalled_reader_that_disconnects_logs_no_traceback(impatient: ServerProcess) -> None:
    channel = grpc.insecure_channel(impatient.address)
    call = started(channel, "Trace", long_trace(40))
    next(call)
    aborted = impatient.log.count("Trace ABORTED")
    while impatient.log.count("Trace ABORTED") == aborted:
        time.sleep(0.05)
    channel.close()
    wait_until_idle(impatient)
    with grpc.insecure_channel(impatient.address) as other:
        assert_alive(other)
    assert "Traceback" not in impatient.log


def test_a_full_queue_refuses_at_once_while_health_answers(impatient: ServerProcess) -> None:
    wait_until_idle(impatient)
    with grpc.insecure_channel(impatient.address) as channel:
        calls = [started(channel, "Trace", long_trace(40)) for _ in range(2)]
        while unfinished(impatient) < 2:
            time.sleep(0.01)
        seconds = []
        for _ in range(10):
            began = time.monotonic()
            answer = refused(channel, "Trace", SHORT)
            seconds.append(time.monotonic() - began)
            assert_alive(channel)
        assert min(seconds) < 0.05  # other programs may delay some
        for call in calls:
            call.cancel()
        wait_until_idle(impatient)
        assert list(started(channel, "Trace", SHORT))[-1].HasField("summary")
    assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (answer.reason, answer.info.domain) == ("QUEUE_FULL", "januslens")
    assert answer.retry_after is not None
    assert answer.retry_after > 0


def assert_alive(channel: grpc.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    ready = health.Check(health_pb2.HealthCheckRequest(service="januslens.ready"), timeout=5)
    assert ready.status == health_pb2.HealthCheckResponse.SERVING
    stub = service_pb2_grpc.IntrospectionServiceStub(channel)
    assert stub.ListModels(models_pb2.ListModelsRequest(), timeout=5).models
