"""Pass results from the compute thread to the event loop: order, errors, limit on bytes."""

from __future__ import annotations

import asyncio
import threading

import pytest

from januslens_server.scheduling.job import ResultBuffer

LIMIT = 10


def buffer_of(*items: int) -> ResultBuffer[int]:
    """Return a buffer that contains `items`, each of which is its own size in bytes."""
    buffer: ResultBuffer[int] = ResultBuffer(LIMIT, lambda item: item)
    for item in items:
        buffer.put(item)
    return buffer


async def read(buffer: ResultBuffer[int], count: int) -> list[int]:
    """Return the next items; all but the last are released."""
    items = buffer.items()
    return [await anext(items) for _ in range(count)]


async def test_items_come_in_order_until_it_is_closed() -> None:
    buffer = buffer_of(*range(100))
    buffer.close()
    assert [item async for item in buffer.items()] == list(range(100))


async def test_items_cross_from_another_thread() -> None:
    buffer = buffer_of()

    def produce() -> None:
        for item in range(1000):
            buffer.put(item)
        buffer.close()

    threading.Thread(target=produce).start()
    assert [item async for item in buffer.items()] == list(range(1000))


async def test_error_is_raised_after_the_items_put_before_it() -> None:
    buffer = buffer_of(1, 2)
    buffer.close(ValueError("late"))
    items = buffer.items()
    assert [await anext(items), await anext(items)] == [1, 2]
    with pytest.raises(ValueError, match="late"):
        await anext(items)


async def test_producer_with_room_does_not_wait() -> None:
    assert not buffer_of(4, 5).when_drained(pytest.fail)


async def test_a_full_buffer_calls_once_there_is_room() -> None:
    buffer = buffer_of(4, 4, 4)
    resumed = threading.Event()
    assert buffer.when_drained(resumed.set)
    items = buffer.items()
    assert await anext(items) == 4
    assert not resumed.is_set()  # it is not released before the reader comes for the next
    assert await anext(items) == 4
    assert resumed.is_set()
    await items.aclose()  # type: ignore[attr-defined]  # the annotation says less than it is


async def test_callback_is_called_at_most_once() -> None:
    buffer = buffer_of(6, 6, 6)
    calls: list[None] = []
    assert buffer.when_drained(lambda: calls.append(None))
    await read(buffer, 3)
    buffer.abandon()
    assert len(calls) == 1


async def test_producer_no_longer_waits_after_the_reader_left() -> None:
    buffer = buffer_of(20)
    resumed = threading.Event()
    assert buffer.when_drained(resumed.set)
    buffer.abandon()
    assert resumed.is_set()
    buffer.put(20)
    assert not buffer.when_drained(pytest.fail)


def test_producer_continues_after_the_readers_loop_closed() -> None:
    """The server may have ended before the device's thread notices it."""

    async def left_behind() -> ResultBuffer[int]:
        return buffer_of()

    buffer = asyncio.run(left_behind())
    buffer.put(1)
    buffer.close()
