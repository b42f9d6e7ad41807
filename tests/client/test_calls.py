"""Calls of both clients to servers that misbehave, hang or require a token."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from januslens import (
    AsyncClient,
    Cancelled,
    Client,
    DeadlineExceeded,
    EventStream,
    LayerGraph,
    StreamInterrupted,
    Trace,
    TraceEvent,
    TraceHeader,
    Unavailable,
    Unimplemented,
)
from januslens._connection import is_loopback, poll_seconds
from januslens.v1 import models_pb2
from tests.client import messages
from tests.client.messages import trace_stream
from tests.client.scripted import Script, serving

PAGES = [
    models_pb2.ListModelsResponse(
        models=[models_pb2.Model(name=name)],
        next_page_token=following,
    )
    for name, following in (("a", "1"), ("b", ""))
]


def test_pages_of_models_are_one_list() -> None:
    with serving(Script(pages=PAGES)) as address, Client(address) as client:
        assert [model.name for model in client.list_models()] == ["a", "b"]


async def test_pages_of_models_are_one_list_when_awaited() -> None:
    with serving(Script(pages=PAGES)) as address:
        async with AsyncClient(address) as client:
            assert [model.name for model in await client.list_models()] == ["a", "b"]


def test_every_call_has_its_own_id_and_the_token() -> None:
    script = Script(responses=trace_stream())
    with serving(script) as address, Client(address, token="sesame") as client:  # noqa: S106
        client.trace("a b")
        client.trace("a b")
    first, second = script.metadata
    assert first["authorization"] == "Bearer sesame"
    assert first["x-request-id"] != second["x-request-id"]
    assert len(first["x-request-id"]) == 32


def test_without_a_token_none_is_sent() -> None:
    script = Script(responses=trace_stream())
    with serving(script) as address, Client(address) as client:
        client.trace("a b")
    assert "authorization" not in script.metadata[0]


OWN = (("x-team", "lens"), ("x-context-bin", b"\x00\xff"))


def test_own_metadata_is_sent_with_every_call() -> None:
    script = Script(responses=trace_stream(), pages=PAGES[1:])
    with serving(script) as address, Client(address, metadata=OWN) as client:
        client.trace("a b")
        client.list_models()
    assert all(received.items() >= dict(OWN).items() for received in script.metadata)


@pytest.mark.parametrize(
    ("pair", "error", "said"),
    [
        (("X-Team", "lens"), ValueError, "expected a-z, 0-9, _, . and -"),
        (("x-request-id", "mine"), ValueError, "set by the client"),
        (("x-team", "\n"), ValueError, "expected printable ASCII"),
        (("x-context-bin", "text"), TypeError, "expected bytes"),
    ],
)
def test_metadata_that_cannot_be_sent_is_refused(
    pair: tuple[str, str], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        Client(metadata=[pair])


class Counting(grpc.UnaryUnaryClientInterceptor):
    calls = 0

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        self.calls += 1
        return continuation(details, request)


class AsyncCounting(grpc.aio.UnaryUnaryClientInterceptor):
    calls = 0

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        self.calls += 1
        return await continuation(details, request)


def test_interceptors_see_each_call() -> None:
    counting = Counting()
    with serving(Script(pages=PAGES)) as address:
        with Client(address, interceptors=[counting]) as client:
            client.list_models()
        assert counting.calls == len(PAGES)


async def test_asynchronous_interceptors_see_each_call() -> None:
    counting = AsyncCounting()
    with serving(Script(pages=PAGES)) as address:
        async with AsyncClient(address, interceptors=[counting]) as client:
            await client.list_models()
    assert counting.calls == len(PAGES)


def test_interrupted_stream_raises_with_the_received_part() -> None:
    with (
        serving(Script(responses=trace_stream()[:2])) as address,
        Client(address) as client,
        pytest.raises(StreamInterrupted) as caught,
    ):
        client.trace("a b")
    assert isinstance(caught.value.partial, Trace)
    assert len(caught.value.partial.layers) == 1


def test_interrupted_stream_raises_at_the_end_of_iteration() -> None:
    seen: list[object] = []
    with serving(Script(responses=trace_stream()[:2])) as address, Client(address) as client:
        stream = client.stream_trace("a b")
        with pytest.raises(StreamInterrupted):
            seen.extend(stream)
    assert [type(event).__name__ for event in seen] == ["TraceHeader", "LayerGraph"]


async def test_interrupted_stream_raises_when_awaited() -> None:
    with serving(Script(responses=trace_stream()[:2])) as address:
        async with AsyncClient(address) as client:
            with pytest.raises(StreamInterrupted) as caught:
                await client.trace("a b")
    assert isinstance(caught.value.partial, Trace)


def test_passed_deadline_raises_with_the_received_part() -> None:
    script = Script(responses=trace_stream()[:2], hangs=True)
    with (
        serving(script) as address,
        Client(address, timeout=0.5) as client,
        pytest.raises(DeadlineExceeded) as caught,
    ):
        client.trace("a b")
    assert isinstance(caught.value.partial, Trace)
    assert len(caught.value.partial.layers) == 1


def test_timeout_of_a_call_overrides_that_of_the_client() -> None:
    script = Script(hangs=True)
    with (
        serving(script) as address,
        Client(address, timeout=60) as client,
        pytest.raises(DeadlineExceeded),
    ):
        client.trace("a b", timeout=0.1)


def test_leaving_the_block_cancels_the_call() -> None:
    script = Script(responses=trace_stream()[:2], hangs=True)
    with serving(script) as address, Client(address) as client:
        with client.stream_trace("a b") as stream:
            next(stream)
            assert isinstance(next(stream), LayerGraph)
            assert not script.left.is_set()
        assert script.left.wait(10)
        assert list(stream) == []
        with pytest.raises(StreamInterrupted):
            stream.result()


async def test_leaving_the_block_cancels_the_awaited_call() -> None:
    script = Script(responses=trace_stream()[:2], hangs=True)
    with serving(script) as address:
        async with AsyncClient(address) as client:
            async with client.stream_trace("a b") as stream:
                await anext(stream)
                assert isinstance(await anext(stream), LayerGraph)
            assert await asyncio.to_thread(script.left.wait, 10)
            assert [event async for event in stream] == []
            with pytest.raises(StreamInterrupted):
                await stream.result()


async def test_cancelling_the_task_cancels_the_call_and_raises_cancelled_error() -> None:
    script = Script(responses=trace_stream()[:1], hangs=True)
    with serving(script) as address:
        async with AsyncClient(address) as client:
            task = asyncio.create_task(client.trace("a b"))
            assert await asyncio.to_thread(script.called.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(script.left.wait, 10)


async def test_closing_while_another_task_waits_ends_its_iteration() -> None:
    script = Script(responses=trace_stream()[:1], hangs=True)
    with serving(script) as address:
        async with AsyncClient(address) as client:
            stream = client.stream_trace("a b")
            await anext(stream)
            waiting = asyncio.create_task(anext(stream, None))
            await asyncio.sleep(0.05)
            await stream.close()
            assert await waiting is None


def test_unreachable_server_is_named() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        client.list_models()


def test_unimplemented_method_raises_unimplemented() -> None:
    with serving(Script()) as address, Client(address) as client, pytest.raises(Unimplemented):
        client.tokenize("a")


def test_hook_receives_every_response() -> None:
    shown: list[object] = []
    responses = trace_stream()
    with (
        serving(Script(responses=responses)) as address,
        Client(address, on_response=shown.append) as client,
    ):
        trace = client.trace("a b")
    assert shown == responses == list(trace.responses)


def test_arguments_are_refused_before_anything_is_sent() -> None:
    script = Script(responses=trace_stream())
    with (
        serving(script) as address,
        Client(address) as client,
        pytest.raises(ValueError, match="layers"),
    ):
        client.trace("a b", layers=[2**31])
    assert script.metadata == []


def test_the_result_does_not_depend_on_how_it_was_read() -> None:
    with serving(Script(responses=trace_stream())) as address, Client(address) as client:
        whole = client.trace("a b")
        with client.stream_trace("a b") as stream:
            layers = [event for event in stream if isinstance(event, LayerGraph)]
            assert stream.result() == whole
    assert tuple(layers) == whole.layers
    assert whole.responses == tuple(messages.trace_stream())


async def test_a_dropped_stream_is_cancelled_at_once() -> None:
    script = Script(responses=trace_stream()[:2], hangs=True)
    with serving(script) as address:
        async with AsyncClient(address) as client:

            async def read_one() -> None:
                async for _ in client.stream_trace("a b"):
                    break

            await read_one()
            assert await asyncio.to_thread(script.left.wait, 10)


async def test_a_stream_dropped_by_another_thread_is_cancelled() -> None:
    script = Script(responses=trace_stream()[:2], hangs=True)
    with serving(script) as address:
        async with AsyncClient(address) as client:
            held = [client.stream_trace("a b")]
            await anext(held[0])
            await asyncio.to_thread(held.clear)
            assert await asyncio.to_thread(script.left.wait, 10)


def test_a_dropped_stream_of_the_synchronous_client_is_cancelled() -> None:
    script = Script(responses=trace_stream()[:2], hangs=True)
    with serving(script) as address, Client(address) as client:

        def read_one() -> None:
            for _ in client.stream_trace("a b"):
                break

        read_one()
        assert script.left.wait(10)


def reading(stream: EventStream[TraceEvent, Trace], until: threading.Event) -> Iterator[TraceEvent]:
    """Read a stream's events; set `until` after the first of a layer."""
    for event in stream:
        yield event
        if isinstance(event, LayerGraph):
            until.set()


def test_closing_a_stream_in_another_thread_ends_its_iteration() -> None:
    script, read = Script(responses=trace_stream()[:2], hangs=True), threading.Event()
    with (
        serving(script) as address,
        Client(address) as client,
        futures.ThreadPoolExecutor(1) as pool,
    ):
        stream = client.stream_trace("a b")
        events = pool.submit(lambda: list(reading(stream, read)))
        assert read.wait(10)
        stream.close()
        assert [type(event) for event in events.result(10)] == [TraceHeader, LayerGraph]
        assert script.left.wait(10)


def test_closing_a_client_in_another_thread_cancels_its_streams() -> None:
    script, read = Script(responses=trace_stream()[:2], hangs=True), threading.Event()
    with serving(script) as address, futures.ThreadPoolExecutor(1) as pool:
        client = Client(address)
        stream = client.stream_trace("a b")
        events = pool.submit(lambda: list(reading(stream, read)))
        assert read.wait(10)
        client.close()
        with pytest.raises(Cancelled):
            events.result(10)
        assert script.left.wait(10)


FORKING = """
import os, sys
from januslens import Client

client = Client(sys.argv[1])
for _ in range(2):  # before and after the parent's first call
    child = os.fork()
    names = [model.name for model in client.list_models(timeout=30)]
    if child == 0:
        os._exit(0 if names == ["a", "b"] else 1)
    assert names == ["a", "b"]
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_client_works_in_a_forked_process_and_in_its_parent() -> None:
    with serving(Script(pages=PAGES)) as address:
        subprocess.run([sys.executable, "-c", FORKING, address], check=True, timeout=100)


async def test_both_clients_reach_a_server_on_a_unix_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with serving(Script(pages=PAGES), f"unix:{tmp_path}/s") as address:
        with Client(address) as client:
            assert [model.name for model in client.list_models()] == ["a", "b"]
        async with AsyncClient(address) as client:
            assert await names_from(client) == ["a", "b"]


def test_one_asynchronous_client_serves_one_event_loop_after_another() -> None:
    with serving(Script(pages=PAGES)) as address:
        client = AsyncClient(address)
        names = [asyncio.run(names_from(client)) for _ in range(3)]
        asyncio.run(client.close())
    assert names == [["a", "b"]] * 3


async def test_one_asynchronous_client_serves_two_event_loops_at_once() -> None:
    with serving(Script(pages=PAGES)) as address:
        async with AsyncClient(address) as client:
            here, elsewhere = await asyncio.gather(
                names_from(client), asyncio.to_thread(asyncio.run, names_from(client))
            )
    assert here == elsewhere == ["a", "b"]


async def names_from(client: AsyncClient) -> list[str]:
    return [model.name for model in await client.list_models()]


@pytest.mark.parametrize("seconds", [float("inf"), 1e10, 1e300])
def test_very_large_timeout_means_no_limit(seconds: float) -> None:
    with serving(Script(pages=PAGES)) as address, Client(address, timeout=seconds) as client:
        assert len(client.list_models()) == 2
        assert len(client.list_models(timeout=seconds)) == 2


@pytest.mark.parametrize(
    ("timeout", "error"),
    [
        (timedelta(seconds=1), TypeError),
        (float("nan"), ValueError),
        (-1, ValueError),
        ("1", TypeError),
        (True, TypeError),
    ],
)
def test_invalid_timeout_is_refused(timeout: Any, error: type[Exception]) -> None:
    for client_type in (Client, AsyncClient):
        with pytest.raises(error, match="invalid timeout"):
            client_type(timeout=timeout)
    with Client("127.0.0.1:1") as client, pytest.raises(error, match="invalid timeout"):
        client.list_models(timeout=timeout)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:50051",
        "127.8.8.8:1",
        "localhost:50051",
        "LOCALHOST",
        "januslens.localhost.:1",
        "[::1]:50051",
        "::1",
        "0.0.0.0:50051",
        "dns:///localhost:50051",
        "dns://8.8.8.8/localhost:50051",
        "ipv4:127.0.0.1:1,127.0.0.2:2",
        "ipv6:[::1]:50051",
        "ipv6:%5B::1%5D:50051",
        "unix:/run/januslens.sock",
        "unix:///run/januslens.sock",
        "unix-abstract:januslens",
    ],
)
def test_a_loopback_address_is_never_reached_through_a_proxy(address: str) -> None:
    with Client(address) as client:
        assert ("grpc.enable_http_proxy", 0) in client._connection.channel_options


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1:50051",
        "localhost.example.com:1",
        "dns:///januslens:50051",
        "ipv4:127.0.0.1,10.0.0.1",
    ],
)
def test_any_other_address_may_be_reached_through_a_proxy(address: str) -> None:
    assert not is_loopback(address)


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_call_to_loopback_bypasses_the_proxy(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    with serving(Script(pages=PAGES)) as address, Client(address) as client:
        assert len(client.list_models(timeout=20)) == 2


@pytest.mark.parametrize(("waited", "seconds"), [(0.0, 0.2), (20.0, 2.0), (3600.0, 5.0)])
def test_a_model_that_loads_for_long_is_asked_for_less_often(waited: float, seconds: float) -> None:
    assert poll_seconds(waited) == pytest.approx(seconds)
