"""What the clients make of servers that misbehave, hang or want a token."""

from __future__ import annotations

import asyncio

import pytest

from januslens import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    LayerGraph,
    StreamInterrupted,
    Trace,
    Unavailable,
    Unimplemented,
)
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


def test_a_cut_stream_raises_with_what_came() -> None:
    with (
        serving(Script(responses=trace_stream()[:2])) as address,
        Client(address) as client,
        pytest.raises(StreamInterrupted) as caught,
    ):
        client.trace("a b")
    assert isinstance(caught.value.partial, Trace)
    assert len(caught.value.partial.layers) == 1


def test_a_cut_stream_raises_at_its_end_for_those_who_iterate() -> None:
    seen: list[object] = []
    with serving(Script(responses=trace_stream()[:2])) as address, Client(address) as client:
        stream = client.stream_trace("a b")
        with pytest.raises(StreamInterrupted):
            seen.extend(stream)
    assert [type(event).__name__ for event in seen] == ["TraceHeader", "LayerGraph"]


async def test_a_cut_stream_raises_when_awaited() -> None:
    with serving(Script(responses=trace_stream()[:2])) as address:
        async with AsyncClient(address) as client:
            with pytest.raises(StreamInterrupted) as caught:
                await client.trace("a b")
    assert isinstance(caught.value.partial, Trace)


def test_a_passed_deadline_raises_with_what_came() -> None:
    script = Script(responses=trace_stream()[:2], hangs=True)
    with (
        serving(script) as address,
        Client(address, timeout=0.5) as client,
        pytest.raises(DeadlineExceeded) as caught,
    ):
        client.trace("a b")
    assert isinstance(caught.value.partial, Trace)
    assert len(caught.value.partial.layers) == 1


def test_a_calls_own_timeout_goes_before_the_clients() -> None:
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


async def test_cancelling_the_task_cancels_the_call_and_is_no_error_of_ours() -> None:
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


def test_a_server_that_is_not_there_is_named() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        client.list_models()


def test_a_call_that_the_server_does_not_offer() -> None:
    with serving(Script()) as address, Client(address) as client, pytest.raises(Unimplemented):
        client.tokenize("a")


def test_every_response_is_shown_to_the_hook() -> None:
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
        client.trace("a b", layers=[-1])
    assert script.metadata == []


def test_the_result_does_not_depend_on_how_it_was_read() -> None:
    with serving(Script(responses=trace_stream())) as address, Client(address) as client:
        whole = client.trace("a b")
        with client.stream_trace("a b") as stream:
            layers = [event for event in stream if isinstance(event, LayerGraph)]
            assert stream.result() == whole
    assert tuple(layers) == whole.layers
    assert whole.responses == tuple(messages.trace_stream())
