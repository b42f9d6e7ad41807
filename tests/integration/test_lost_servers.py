"""Two servers behind one name, one of which is killed or drained during a request."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from januslens import (
    AsyncClient,
    Client,
    GradientInterrupted,
    LayerGraph,
    Matrix,
    StreamInterrupted,
    Trace,
    TraceInterrupted,
)
from tests.support.calls import timeless
from tests.support.metrics import sample
from tests.support.replicas import Replicas, running_replicas

IDS = list(range(300, 312))
# A request that takes the demo seconds, so that there is time to kill the server.
MUCH: dict[str, Any] = {"positions": "all", "overlap_k": 500, "top_k": 2, "bottom_k": 0}
# Results of 37 MiB. The buffers in between hold less, so that the server cannot finish before the
# test kills it.
LEARN: dict[str, Any] = {
    "matrices": ["q", "k", "v", "o", "ff1", "ff2"],
    "components": 0,
    "factors": True,
    "top_k": 900,
    "bottom_k": 900,
}
MANY_IDS = list(range(300, 390))


@pytest.fixture(scope="module")
def pair() -> Iterator[Replicas]:
    with running_replicas(2) as replicas:
        yield replicas


@pytest.fixture
def replicas(pair: Replicas) -> Replicas:
    """Two ready servers; restarts those that the previous test has ended."""
    for number, server in enumerate(pair.servers):
        if server.process.poll() is not None:
            pair.start(number)
    for server in pair.servers:
        server.wait_for("ready")
    return pair


def same(found: Trace) -> Trace:
    """A result without its request id and times, which differ by design."""
    assert found.summary is not None
    header = replace(found.header, request_id="")
    return replace(found, header=header, summary=replace(found.summary, times=()))


def test_a_trace_resumes_on_the_other_server(
    replicas: Replicas, caplog: pytest.LogCaptureFixture
) -> None:
    with Client(replicas.address, resume=True, timeout=120) as client:
        with caplog.at_level(logging.WARNING), client.stream_trace(IDS, **MUCH) as stream:
            for event in stream:
                if isinstance(event, LayerGraph) and not stream.interruptions:
                    replicas.kill(replicas.serving("Trace"))
            found = stream.result()
        (cut,) = stream.interruptions
        assert isinstance(cut, TraceInterrupted)
        assert f"Trace {cut.request_id} was interrupted" in caplog.text
        assert isinstance(cut.partial, Trace)
        assert 1 <= len(cut.partial.layers) < 4
        whole = client.trace(IDS, **MUCH)
    assert same(found) == same(whole)


def test_without_resume_an_interruption_raises_with_the_received_part(replicas: Replicas) -> None:
    with Client(replicas.address, timeout=120) as client:
        stream = client.stream_trace(IDS, **MUCH)
        while not isinstance(next(stream), LayerGraph):
            pass
        replicas.kill(replicas.serving("Trace"))
        with pytest.raises(TraceInterrupted) as caught:
            stream.result()
    assert isinstance(caught.value.partial, Trace)
    assert caught.value.partial.layers
    assert (caught.value.reason, caught.value.retry_after) == ("STREAM_INTERRUPTED", 0.0)


async def test_a_gradient_resumes_on_the_other_server(replicas: Replicas) -> None:
    async with AsyncClient(replicas.address, resume=True, timeout=120) as client:
        async with client.stream_gradient_lens(MANY_IDS, [5], **LEARN) as stream:
            async for event in stream:
                if isinstance(event, Matrix) and not stream.interruptions:
                    replicas.kill(replicas.serving("GradientLens"))
            found = await stream.result()
        (cut,) = stream.interruptions
        assert isinstance(cut, GradientInterrupted)
        whole = await client.gradient_lens(MANY_IDS, [5], **LEARN)
    assert found.summary is not None
    assert found.summary.matrices == len(whole.matrices) == 24
    assert [timeless(m) for m in found.responses] == [timeless(m) for m in whole.responses]


@pytest.mark.soak
def test_a_request_queued_on_a_lost_server_is_repeated(replicas: Replicas) -> None:
    """The request was admitted, so without `resume` it is not repeated; no part has arrived."""
    with Client(replicas.address, timeout=120) as client:
        outcomes: list[Trace | StreamInterrupted] = []

        def ask(resume: bool) -> None:
            with Client(f"127.0.0.1:{replicas.ports[0]}", resume=resume) as own:
                try:
                    outcomes.append(own.trace(IDS, timeout=30))
                except StreamInterrupted as cut:
                    outcomes.append(cut)

        with Client(f"127.0.0.1:{replicas.ports[0]}") as busy:
            stream = busy.stream_trace(IDS, **MUCH)
            next(stream)
            callers = [threading.Thread(target=ask, args=(resume,)) for resume in (False, True)]
            for caller in callers:
                caller.start()
            deadline = time.monotonic() + 20
            while waiting(replicas) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            replicas.kill(0)
            replicas.start(0)
            for caller in callers:
                caller.join()
        assert client.tokenize("Japan")
    assert {type(outcome) for outcome in outcomes} == {Trace, TraceInterrupted}
    cut = next(outcome for outcome in outcomes if isinstance(outcome, TraceInterrupted))
    assert cut.partial is None


def waiting(replicas: Replicas) -> float:
    return sample(replicas.servers[0], "januslens_queue_depth")


@pytest.mark.soak
def test_calls_that_were_not_admitted_are_repeated_silently(replicas: Replicas) -> None:
    with Client(replicas.address, timeout=60) as client:
        for number in (0, 1):
            assert client.tokenize("Japan")
            replicas.kill(number)
            assert all(client.tokenize("Japan") for _ in range(20))
            replicas.start(number)
            replicas.servers[number].wait_for("ready")


def test_calls_to_a_draining_server_go_to_the_other(replicas: Replicas) -> None:
    with Client(replicas.address, timeout=60) as client:
        stream = client.stream_trace(IDS, **MUCH)
        next(stream)
        draining = replicas.servers[replicas.serving("Trace")]
        draining.process.terminate()
        draining.wait_for("draining")
        for _ in range(10):
            assert len(client.trace(IDS, layers=[0]).layers) == 1
        assert stream.result().summary
    assert draining.process.wait(timeout=30) == 0
