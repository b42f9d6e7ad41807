"""Bound the bytes that callers have not read, fairly among callers."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from januslens_server.errors import QueueFull
from januslens_server.rpc import unread
from januslens_server.rpc.unread import Unread, UnreadStream

LIMIT = 10


def opened(stack: ExitStack, total: Unread, caller: str, size: int) -> UnreadStream:
    """A stream with unread bytes, of which a message waits to be read."""
    stream = stack.enter_context(total.stream(caller))
    stack.enter_context(stream.writing())
    stream.count(size)
    return stream


async def test_the_caller_with_the_most_unread_bytes_loses_the_stream_that_waits_longest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unread, "PATIENCE", 0.0)
    total = Unread(LIMIT)
    with ExitStack() as stack:
        other = opened(stack, total, "bob", 4)
        first, second = (opened(stack, total, "ada", 3) for _ in range(2))
        assert not any(stream.evicted.done() for stream in (other, first, second))
        third = opened(stack, total, "ada", 2)
        assert [s.evicted.done() for s in (other, first, second, third)] == [
            False,
            True,
            False,
            False,
        ]


async def test_streams_that_are_read_are_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unread, "PATIENCE", 0.0)
    total = Unread(LIMIT)
    with total.stream("ada") as stream:
        stream.count(LIMIT + 1)
        assert not stream.evicted.done()
        with stream.writing():
            await asyncio.wait_for(stream.evicted, 10)  # it is looked at again


async def test_new_streams_of_a_caller_with_its_share_are_refused() -> None:
    total = Unread(LIMIT)
    with ExitStack() as stack:
        opened(stack, total, "ada", LIMIT + 1)
        with pytest.raises(QueueFull, match="of your results are not read"):
            stack.enter_context(total.stream("ada"))
        stack.enter_context(total.stream("bob"))


async def test_bytes_of_a_closed_stream_no_longer_count() -> None:
    total = Unread(LIMIT)
    with total.stream("ada") as stream:
        stream.count(LIMIT + 1)
    stream.count(-1)  # a result that its buffer released late
    with total.stream("ada") as following:
        following.count(LIMIT)
        assert total._size == LIMIT
