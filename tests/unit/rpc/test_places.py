"""Places that calls take, and threads that callers and models share."""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack

import pytest

from januslens_server.rpc.places import FairPlaces, Threads, hold_places, leave_places


async def test_a_free_place_goes_to_the_caller_with_the_fewest() -> None:
    places, order = FairPlaces(2), list[str]()

    async def call(caller: str, until: asyncio.Event) -> None:
        with ExitStack() as held:
            await places.take(caller, held)
            order.append(caller)
            await until.wait()

    ended = [asyncio.Event() for _ in range(5)]
    callers = ["greedy", "greedy", "greedy", "greedy", "modest"]
    calls = []
    for caller, event in zip(callers, ended, strict=True):
        calls.append(asyncio.create_task(call(caller, event)))
        await asyncio.sleep(0)
    assert order == ["greedy", "greedy"]
    assert places.waiting == 3
    ended[0].set()
    await calls[0]
    await asyncio.sleep(0)
    assert order[2] == "modest"
    for event in ended:
        event.set()
    await asyncio.gather(*calls)
    assert places.waiting == 0


@pytest.mark.parametrize("granted", [False, True])
async def test_a_cancelled_call_loses_no_place(granted: bool) -> None:
    places, first = FairPlaces(1), ExitStack()
    await places.take("one", first)
    waiting = asyncio.create_task(places.take("two", ExitStack()))
    await asyncio.sleep(0)
    if granted:
        first.close()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    first.close()
    async with asyncio.timeout(5):
        await places.take("three", ExitStack())


async def test_places_are_left_once() -> None:
    places, held = FairPlaces(1), ExitStack()
    await places.take("one", held)
    hold_places("one", held)
    leave_places()
    leave_places()
    await places.take("one", ExitStack())
    waiting = asyncio.create_task(places.take("two", ExitStack()))
    await asyncio.sleep(0)
    assert places.waiting == 1
    waiting.cancel()


async def run_as(caller: str, threads: Threads, model: str, work: threading.Event) -> bool:
    hold_places(caller, ExitStack())
    return await threads.run(model, lambda: work.wait(30))


async def test_work_of_one_caller_does_not_delay_another() -> None:
    threads, slow, done = Threads("test", 4, 2, 1), threading.Event(), threading.Event()
    done.set()
    busy = [asyncio.create_task(run_as("busy", threads, "model", slow)) for _ in range(8)]
    await asyncio.sleep(0)
    async with asyncio.timeout(20):
        assert await asyncio.create_task(run_as("other", threads, "model", done))
    assert not any(task.done() for task in busy)
    slow.set()
    assert all(await asyncio.gather(*busy))


async def test_work_for_one_model_does_not_delay_another() -> None:
    """Also if the tokenizer of a model never ends, and for every caller."""
    threads, slow, done = Threads("test", 4, 2, 1), threading.Event(), threading.Event()
    done.set()
    callers = [f"caller{i}" for i in range(8)]
    busy = [asyncio.create_task(run_as(c, threads, "slow", slow)) for c in callers]
    await asyncio.sleep(0)
    async with asyncio.timeout(20):
        assert await asyncio.create_task(run_as("caller9", threads, "fast", done))
    assert not any(task.done() for task in busy)
    slow.set()
    assert all(await asyncio.gather(*busy))


async def test_cancelled_work_counts_for_its_caller_until_it_ends() -> None:
    threads, slow, done = Threads("test", 4, 4, 1), threading.Event(), threading.Event()
    done.set()
    cancelled = asyncio.create_task(run_as("one", threads, "model", slow))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    second = asyncio.create_task(run_as("one", threads, "model", done))
    finished, _ = await asyncio.wait({second}, timeout=0.2)
    assert not finished
    slow.set()
    assert await second
