"""From the compute thread to the event loop: order, errors, and the bound on bytes."""

from __future__ import annotations

import asyncio
import threading

import pytest

from januslens_server.scheduling.job import Outlet

LIMIT = 10


def outlet_of(*items: int) -> Outlet[int]:
    """An outlet that holds `items`, each as many bytes as it says."""
    outlet: Outlet[int] = Outlet(LIMIT, lambda item: item)
    for item in items:
        outlet.put(item)
    return outlet


async def read(outlet: Outlet[int], count: int) -> list[int]:
    """The next items, and the release of all but the last of them."""
    items = outlet.items()
    return [await anext(items) for _ in range(count)]


async def test_items_come_in_order_until_it_is_closed() -> None:
    outlet = outlet_of(*range(100))
    outlet.close()
    assert [item async for item in outlet.items()] == list(range(100))


async def test_items_cross_from_another_thread() -> None:
    outlet = outlet_of()

    def produce() -> None:
        for item in range(1000):
            outlet.put(item)
        outlet.close()

    threading.Thread(target=produce).start()
    assert [item async for item in outlet.items()] == list(range(1000))


async def test_an_error_comes_after_what_was_put() -> None:
    outlet = outlet_of(1, 2)
    outlet.close(ValueError("late"))
    items = outlet.items()
    assert [await anext(items), await anext(items)] == [1, 2]
    with pytest.raises(ValueError, match="late"):
        await anext(items)


async def test_a_producer_with_room_is_not_held_up() -> None:
    assert not outlet_of(4, 5).when_drained(pytest.fail)


async def test_a_full_outlet_calls_once_there_is_room() -> None:
    outlet = outlet_of(4, 4, 4)
    resumed = threading.Event()
    assert outlet.when_drained(resumed.set)
    items = outlet.items()
    assert await anext(items) == 4
    assert not resumed.is_set()  # it is not released before the reader comes for the next
    assert await anext(items) == 4
    assert resumed.is_set()
    await items.aclose()  # type: ignore[attr-defined]  # the annotation says less than it is


async def test_it_calls_no_more_than_once() -> None:
    outlet = outlet_of(6, 6, 6)
    calls: list[None] = []
    assert outlet.when_drained(lambda: calls.append(None))
    await read(outlet, 3)
    outlet.abandon()
    assert len(calls) == 1


async def test_a_reader_that_leaves_wakes_the_producer_and_keeps_it_awake() -> None:
    outlet = outlet_of(20)
    resumed = threading.Event()
    assert outlet.when_drained(resumed.set)
    outlet.abandon()
    assert resumed.is_set()
    outlet.put(20)
    assert not outlet.when_drained(pytest.fail)


def test_a_producer_survives_its_readers_loop() -> None:
    """The server may be gone before the device's thread has noticed."""

    async def left_behind() -> Outlet[int]:
        return outlet_of()

    outlet = asyncio.run(left_behind())
    outlet.put(1)
    outlet.close()
