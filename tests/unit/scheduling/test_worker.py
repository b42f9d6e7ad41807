"""The one thread that computes: order, taking turns, isolation, limits and what is left over."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from januslens_server.errors import DeadlinePassed, QueueFull, RequestCancelled, ServerDraining
from januslens_server.scheduling.outlet import Outlet
from januslens_server.scheduling.ticket import Ticket
from januslens_server.scheduling.worker import Checkpoint, DeviceWorker

LIMIT = 10
Run = Callable[[Checkpoint], Iterator[int]]


class Tensor:
    """Something that would fill the device's memory."""


def job(*items: int) -> Run:
    """A request that yields `items`, each as many bytes as it says."""

    def run(_checkpoint: Checkpoint) -> Iterator[int]:
        yield from items

    return run


def gated(gate: threading.Event, *items: int) -> Run:
    """A request that waits for a gate before each of its items."""

    def run(_checkpoint: Checkpoint) -> Iterator[int]:
        for item in items:
            assert gate.wait(5)
            yield item

    return run


def submitted(
    worker: DeviceWorker, run: Callable[[Checkpoint], Iterator[Any]], ticket: Ticket | None = None
) -> Outlet[Any]:
    outlet: Outlet[Any] = Outlet(LIMIT, lambda item: item)
    worker.submit(run, outlet, ticket or Ticket(None))
    return outlet


async def all_of(outlet: Outlet[Any]) -> list[Any]:
    async with asyncio.timeout(5):
        return [item async for item in outlet.items()]


async def idle(worker: DeviceWorker) -> bool:
    return await asyncio.to_thread(worker.wait_idle, 5)


@pytest.fixture
def worker() -> DeviceWorker:
    return DeviceWorker(max_waiting=8)


async def test_requests_run_in_order_of_arrival(worker: DeviceWorker) -> None:
    gate, ran = threading.Event(), list[str]()

    def noting(name: str) -> Run:
        def run(_checkpoint: Checkpoint) -> Iterator[int]:
            for _ in range(2):
                ran.append(name)
                yield 0

        return run

    outlets = [submitted(worker, gated(gate, 0))]
    outlets += [submitted(worker, noting(name)) for name in "abc"]
    gate.set()
    for outlet in outlets:
        await all_of(outlet)
    assert ran == list("aabbcc")


async def test_results_come_in_order(worker: DeviceWorker) -> None:
    items = list(range(500))
    assert await all_of(submitted(worker, job(*items))) == items


async def test_an_unread_request_is_set_aside_for_others(worker: DeviceWorker) -> None:
    long = submitted(worker, job(*[6] * 10))
    assert await all_of(submitted(worker, job(1, 2))) == [1, 2]
    assert worker.unfinished == 1
    assert not worker.wait_idle(0)
    assert await all_of(long) == [6] * 10
    assert await idle(worker)


async def test_a_request_that_resumes_goes_first(worker: DeviceWorker) -> None:
    """It was here earlier, and holds the memory."""
    gate, began, ran = threading.Event(), threading.Event(), list[str]()

    def noting(name: str) -> Run:
        def run(_checkpoint: Checkpoint) -> Iterator[int]:
            ran.append(name)
            began.set()
            yield 3 * LIMIT
            ran.append(name)

        return run

    unread = submitted(worker, noting("early"))
    running = submitted(worker, gated(gate, 0))
    waiting = submitted(worker, noting("late"))
    assert await asyncio.to_thread(began.wait, 5)
    items = unread.items()
    assert await anext(items) == 3 * LIMIT
    resumed = asyncio.create_task(anext(items, None))
    await asyncio.sleep(0.01)
    gate.set()
    await all_of(running)
    assert await resumed is None
    await all_of(waiting)
    assert ran == ["early", "early", "late", "late"]


async def test_many_slow_readers_all_get_everything(worker: DeviceWorker) -> None:
    outlets = [submitted(worker, job(*[7] * 50)) for _ in range(8)]
    assert await asyncio.gather(*map(all_of, outlets)) == [[7] * 50] * 8
    assert await idle(worker)


async def test_an_error_belongs_to_its_request_alone(worker: DeviceWorker) -> None:
    def failing(_checkpoint: Checkpoint) -> Iterator[int]:
        yield 1
        raise ValueError("mine")

    failed, healthy = submitted(worker, failing), submitted(worker, job(1, 2))
    with pytest.raises(ValueError, match="mine"):
        await all_of(failed)
    assert await all_of(healthy) == [1, 2]
    assert await idle(worker)


async def test_an_error_is_told_in_the_services_terms() -> None:
    def failing(_checkpoint: Checkpoint) -> Iterator[int]:
        yield 1
        raise MemoryError("no room")

    worker = DeviceWorker(max_waiting=1, translate=lambda error: KeyError(str(error)))
    with pytest.raises(KeyError, match="no room"):
        await all_of(submitted(worker, failing))


async def test_the_checkpoint_is_the_tickets(worker: DeviceWorker) -> None:
    ticket = Ticket(None)

    def cancelled_inside(checkpoint: Checkpoint) -> Iterator[int]:
        ticket.cancel()
        checkpoint()
        yield 1

    with pytest.raises(RequestCancelled):
        await all_of(submitted(worker, cancelled_inside, ticket))


@pytest.mark.parametrize(
    ("ticket", "error"), [(Ticket(None), RequestCancelled), (Ticket(0.0), DeadlinePassed)]
)
async def test_a_request_that_ended_in_the_queue_never_computes(
    worker: DeviceWorker, ticket: Ticket, error: type[Exception]
) -> None:
    gate, ran = threading.Event(), list[None]()

    def run(_checkpoint: Checkpoint) -> Iterator[int]:
        ran.append(None)
        yield 1

    submitted(worker, gated(gate, 0))
    waiting = submitted(worker, run, ticket)
    if error is RequestCancelled:
        ticket.cancel()
    gate.set()
    with pytest.raises(error):
        await all_of(waiting)
    assert ran == []


async def test_a_cancelled_request_is_closed_on_the_devices_thread(worker: DeviceWorker) -> None:
    ticket, closed_by = Ticket(None), list[str]()

    def run(_checkpoint: Checkpoint) -> Iterator[int]:
        try:
            while True:
                yield 3
        finally:
            closed_by.append(threading.current_thread().name)

    outlet = submitted(worker, run, ticket)
    await all_of(submitted(worker, job(1)))  # the endless one is set aside
    ticket.cancel()
    outlet.abandon()
    assert await idle(worker)
    assert closed_by == ["device-worker"]


async def test_a_reader_that_leaves_during_a_step_strands_nothing(worker: DeviceWorker) -> None:
    """The step fills the outlet after its reader has gone: nobody would ever resume it."""
    stepping, left, ticket = threading.Event(), threading.Event(), Ticket(None)

    def run(_checkpoint: Checkpoint) -> Iterator[int]:
        stepping.set()
        assert left.wait(5)
        yield 10 * LIMIT

    outlet = submitted(worker, run, ticket)
    assert await asyncio.to_thread(stepping.wait, 5)
    ticket.cancel()
    outlet.abandon()
    left.set()
    assert await idle(worker)


async def test_nothing_of_an_ended_request_stays(worker: DeviceWorker) -> None:
    """Neither what it computed with nor what nobody read, though no other request follows."""
    held: list[weakref.ref[Tensor]] = []

    def run(_checkpoint: Checkpoint) -> Iterator[Tensor]:
        activations = Tensor()
        while True:
            result = Tensor()
            held.extend(map(weakref.ref, (activations, result)))
            yield result

    def left_unread() -> None:
        ticket = Ticket(None)
        outlet: Outlet[Tensor] = Outlet(LIMIT, lambda _: LIMIT)
        worker.submit(run, outlet, ticket)
        while not held:
            time.sleep(0.001)
        ticket.cancel()
        outlet.abandon()

    gc.disable()
    try:
        left_unread()
        assert await idle(worker)
        await asyncio.sleep(0.05)  # until its last callbacks on this loop have run
        assert [reference() for reference in held] == [None] * len(held)
    finally:
        gc.enable()


async def test_nothing_of_a_failed_request_stays(worker: DeviceWorker) -> None:
    """An error's traceback holds every frame it passed through, and their tensors."""
    held: list[weakref.ref[Tensor]] = []

    def run(_checkpoint: Checkpoint) -> Iterator[int]:
        activations = Tensor()
        held.append(weakref.ref(activations))
        yield 1
        raise ValueError("mine")

    async def fail() -> None:
        outlet = submitted(worker, run)
        with suppress(ValueError):
            await all_of(outlet)

    gc.disable()
    try:
        await fail()
        assert await idle(worker)
        await asyncio.sleep(0.05)
        assert [reference() for reference in held] == [None]
    finally:
        gc.enable()


async def test_a_full_queue_refuses_at_once() -> None:
    worker, gate = DeviceWorker(max_waiting=2), threading.Event()
    outlets = [submitted(worker, gated(gate, 1)) for _ in range(3)]
    with pytest.raises(QueueFull, match="2 requests wait already"):
        submitted(worker, job(1))
    assert worker.unfinished == 3
    gate.set()
    for outlet in outlets:
        assert await all_of(outlet) == [1]
    assert await all_of(submitted(worker, job(1))) == [1]


async def test_a_draining_worker_finishes_and_takes_nothing_new(worker: DeviceWorker) -> None:
    gate = threading.Event()
    running = submitted(worker, gated(gate, 1, 2))
    worker.refuse_new()
    with pytest.raises(ServerDraining):
        submitted(worker, job(1))
    assert not worker.wait_idle(0.05)
    gate.set()
    assert await all_of(running) == [1, 2]
    assert await idle(worker)
