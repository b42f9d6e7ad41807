"""The compute thread: order, turns, isolation and limits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from tests.unit.scheduling.jobs import LIMIT, Run, all_of, gated, idle, job, submitted

from januslens_server.errors import (
    CancelCheck,
    DeadlinePassed,
    DeviceLost,
    OutOfMemory,
    QueueFull,
    RequestCancelled,
    ServerDraining,
)
from januslens_server.results import Cost
from januslens_server.scheduling import turns
from januslens_server.scheduling.job import QueuedRequest
from januslens_server.scheduling.worker import SOONEST_RETRY, DeviceWorker


@pytest.fixture
def worker() -> DeviceWorker:
    return DeviceWorker(max_waiting=8)


async def test_requests_run_in_order_of_arrival(worker: DeviceWorker) -> None:
    gate, ran = threading.Event(), list[str]()

    def noting(name: str) -> Run:
        def run(_check_cancelled: CancelCheck) -> Iterator[int]:
            for _ in range(2):
                ran.append(name)
                yield 0

        return run

    buffers = [submitted(worker, gated(gate, 0))]
    buffers += [submitted(worker, noting(name)) for name in "abc"]
    gate.set()
    for buffer in buffers:
        await all_of(buffer)
    assert ran == list("aabbcc")


async def test_results_come_in_order(worker: DeviceWorker) -> None:
    items = list(range(500))
    assert await all_of(submitted(worker, job(*items))) == items


async def test_request_with_a_stalled_reader_is_suspended_for_others(worker: DeviceWorker) -> None:
    long = submitted(worker, job(*[6] * 10))
    assert await all_of(submitted(worker, job(1, 2))) == [1, 2]
    assert worker.unfinished == 1
    assert await all_of(long) == [6] * 10
    assert await idle(worker)


async def test_a_request_that_resumes_goes_first(worker: DeviceWorker) -> None:
    """It was admitted earlier, and uses memory."""
    gate, began, ran = threading.Event(), threading.Event(), list[str]()

    def noting(name: str) -> Run:
        def run(_check_cancelled: CancelCheck) -> Iterator[int]:
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


async def test_many_slow_readers_receive_all_results(worker: DeviceWorker) -> None:
    buffers = [submitted(worker, job(*[7] * 50)) for _ in range(8)]
    assert await asyncio.gather(*map(all_of, buffers)) == [[7] * 50] * 8
    assert await idle(worker)


async def test_error_ends_only_its_own_request(worker: DeviceWorker) -> None:
    def failing(_check_cancelled: CancelCheck) -> Iterator[int]:
        yield 1
        raise ValueError("mine")

    failed, healthy = submitted(worker, failing), submitted(worker, job(1, 2))
    with pytest.raises(ValueError, match="mine"):
        await all_of(failed)
    assert await all_of(healthy) == [1, 2]
    assert await idle(worker)


async def test_worker_translates_errors() -> None:
    def failing(_check_cancelled: CancelCheck) -> Iterator[int]:
        yield 1
        raise MemoryError("no room")

    worker = DeviceWorker(max_waiting=1, translate=lambda error: KeyError(str(error)))
    with pytest.raises(KeyError, match="no room"):
        await all_of(submitted(worker, failing))


async def test_a_request_gets_its_own_check(worker: DeviceWorker) -> None:
    request = QueuedRequest(None)

    def cancelled_inside(check_cancelled: CancelCheck) -> Iterator[int]:
        request.cancel()
        check_cancelled()
        yield 1

    with pytest.raises(RequestCancelled):
        await all_of(submitted(worker, cancelled_inside, request))


@pytest.mark.parametrize(
    ("queued", "error"),
    [(QueuedRequest(None), RequestCancelled), (QueuedRequest(0.0), DeadlinePassed)],
)
async def test_a_request_that_ended_in_the_queue_never_computes(
    worker: DeviceWorker, queued: QueuedRequest, error: type[Exception]
) -> None:
    gate, ran = threading.Event(), list[None]()

    def run(_check_cancelled: CancelCheck) -> Iterator[int]:
        ran.append(None)
        yield 1

    submitted(worker, gated(gate, 0))
    waiting = submitted(worker, run, queued)
    if error is RequestCancelled:
        queued.cancel()
    gate.set()
    with pytest.raises(error):
        await all_of(waiting)
    assert ran == []


@pytest.mark.parametrize("cancelled", [True, False], ids=["cancelled", "deadline"])
async def test_cancelled_waiting_request_leaves_the_queue_at_once(
    worker: DeviceWorker, cancelled: bool
) -> None:
    """The device still computes for another request."""
    gate, request = threading.Event(), QueuedRequest(None if cancelled else 0.0)
    running = submitted(worker, gated(gate, 1))
    waiting = submitted(worker, job(2), request)
    worker.withdraw(request)
    assert worker.unfinished == 1
    with pytest.raises(RequestCancelled):
        await all_of(waiting)
    gate.set()
    assert await all_of(running) == [1]


async def test_cancelled_suspended_request_is_closed_between_two_steps(
    worker: DeviceWorker,
) -> None:
    """It uses memory, so it does not wait for the running request to end."""
    request, stepping, gate = QueuedRequest(None), threading.Event(), threading.Event()

    def long(_check_cancelled: CancelCheck) -> Iterator[int]:
        stepping.set()
        assert gate.wait(5)
        yield 1
        while worker.unfinished > 1:
            yield 0

    aside = submitted(worker, job(*[6] * 10), request)
    await all_of(submitted(worker, job(1)))
    running = submitted(worker, long)
    assert await asyncio.to_thread(stepping.wait, 5)
    worker.withdraw(request)
    aside.abandon()
    assert worker.unfinished == 2
    gate.set()
    assert (await all_of(running))[0] == 1
    assert await idle(worker)


async def test_callers_take_turns(worker: DeviceWorker) -> None:
    """A caller with many requests does not delay one with few."""
    gate, ran = threading.Event(), list[str]()

    def noting(name: str) -> Run:
        def run(_check_cancelled: CancelCheck) -> Iterator[int]:
            ran.append(name)
            time.sleep(0.002)
            yield 0

        return run

    buffers = [submitted(worker, gated(gate, 0))]
    buffers += [submitted(worker, noting(f"a{i}"), QueuedRequest(None, "a")) for i in range(5)]
    buffers += [submitted(worker, noting(f"b{i}"), QueuedRequest(None, "b")) for i in range(2)]
    gate.set()
    for buffer in buffers:
        await all_of(buffer)
    assert [name for name in ran if name[0] == "a"] == ["a0", "a1", "a2", "a3", "a4"]
    assert max(ran.index("b0"), ran.index("b1")) <= 4


def stepping(ran: list[str], name: str, *, until: threading.Event | None = None) -> Run:
    """A request of short steps without results, which ends after 20 or on an event."""

    def run(_check_cancelled: CancelCheck) -> Iterator[int | None]:
        steps = 0
        while steps < 20 if until is None else not until.is_set():
            steps += 1
            ran.append(name)
            time.sleep(0.002)
            yield None
        yield 1

    return run


async def come_true(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; otherwise the test's timeout applies."""
    while not condition():  # noqa: ASYNC110 - the device's thread has no event for it
        await asyncio.sleep(0.01)


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "QUANTUM", 0.005)


@pytest.mark.usefixtures("short_turns")
async def test_long_request_is_suspended_and_resumed(worker: DeviceWorker) -> None:
    """It ends only after the other caller's request, so without turns neither would end."""
    ran, other_ended = list[str](), threading.Event()
    long = submitted(worker, stepping(ran, "a", until=other_ended), QueuedRequest(None, "a"))
    short = submitted(worker, stepping(ran, "b"), QueuedRequest(None, "b"))
    assert await all_of(short) == [1]
    assert worker.in_flight == 1
    other_ended.set()
    assert await all_of(long) == [1]
    first, last = ran.index("b"), len(ran) - 1 - ran[::-1].index("b")
    assert "a" in ran[first:last]  # they took turns
    assert await idle(worker)


@pytest.mark.usefixtures("short_turns")
async def test_one_callers_requests_run_one_after_the_other(worker: DeviceWorker) -> None:
    ran = list[str]()
    buffers = [submitted(worker, stepping(ran, name)) for name in "ab"]
    assert [await all_of(buffer) for buffer in buffers] == [[1], [1]]
    assert ran == ["a"] * 20 + ["b"] * 20


@pytest.mark.usefixtures("short_turns")
@pytest.mark.parametrize("cancelled", [True, False], ids=["cancelled", "deadline"])
async def test_suspended_request_that_ends_is_closed_during_other_requests(
    worker: DeviceWorker, cancelled: bool
) -> None:
    closed, other_ends = list[str](), threading.Event()

    def holding(_check_cancelled: CancelCheck) -> Iterator[None]:
        try:
            while True:
                time.sleep(0.01)
                yield None
        finally:
            closed.append(threading.current_thread().name)

    request, ran = QueuedRequest(None if cancelled else 0.2, "a"), list[str]()
    buffer = submitted(worker, holding, request)
    running = submitted(worker, stepping(ran, "b", until=other_ends), QueuedRequest(None, "b"))
    await come_true(lambda: bool(ran))
    if cancelled:
        worker.withdraw(request)
    with pytest.raises(RequestCancelled if cancelled else DeadlinePassed):
        await all_of(buffer)
    assert closed == ["device-worker"]
    other_ends.set()
    assert await all_of(running) == [1]
    assert await idle(worker)


@pytest.mark.usefixtures("short_turns")
async def test_requests_taking_turns_stay_within_the_memory() -> None:
    """There is room for two of three long requests; the third starts when one ends."""
    worker, ran = DeviceWorker(max_waiting=8, free=lambda _needed: 10), list[str]()
    ends = {name: threading.Event() for name in "abc"}
    buffers = {
        name: submitted(
            worker,
            stepping(ran, name, until=ends[name]),
            QueuedRequest(None, name, Cost(1.0, 5, held=5)),
        )
        for name in "abc"
    }
    await come_true(lambda: len({*ran}) == 2 and len(ran) > 40)
    assert {*ran} == {"a", "b"}
    assert (worker.in_flight, worker.waiting) == (2, 1)
    ends["a"].set()
    assert await all_of(buffers["a"]) == [1]
    ends["c"].set()
    assert await all_of(buffers["c"]) == [1]
    ends["b"].set()
    assert await all_of(buffers["b"]) == [1]


async def test_two_requests_that_fit_alone_but_not_together_run_one_after_the_other() -> None:
    worker, gate = DeviceWorker(max_waiting=8, free=lambda _needed: 10), threading.Event()
    first = submitted(worker, gated(gate, 1), QueuedRequest(None, "a", Cost(1.0, 8, held=8)))
    second = submitted(worker, job(2), QueuedRequest(None, "b", Cost(1.0, 8, held=8)))
    await come_true(lambda: worker.in_flight == 1)
    assert worker.waiting == 1
    gate.set()
    assert [await all_of(first), await all_of(second)] == [[1], [2]]


async def test_out_of_memory_request_gets_retry_info() -> None:
    free = 10.0
    worker, gate = DeviceWorker(max_waiting=8, free=lambda _needed: free), threading.Event()
    first = submitted(worker, gated(gate, 1), QueuedRequest(None, "a", Cost(1.0, 8, held=8)))
    second = submitted(worker, job(2), QueuedRequest(None, "b", Cost(1.0, 8, held=8)))
    await come_true(lambda: worker.in_flight == 1)
    assert worker.fits_alone(8) == 10.0
    free = 5.0  # another program took it
    gate.set()
    assert await all_of(first) == [1]
    with pytest.raises(OutOfMemory, match="estimated to need 8 B;") as refused:
        await all_of(second)
    assert refused.value.retry_after > 0
    free = 10.0
    assert await all_of(submitted(worker, job(3), QueuedRequest(None, "b", Cost(1.0, 8)))) == [3]


@pytest.mark.usefixtures("short_turns")
async def test_lost_device_ends_suspended_requests(worker: DeviceWorker) -> None:
    ran = list[str]()

    def losing(_check_cancelled: CancelCheck) -> Iterator[int]:
        time.sleep(0.01)
        yield 1
        raise DeviceLost

    aside = submitted(worker, stepping(ran, "a", until=threading.Event()), QueuedRequest(None, "a"))
    await come_true(lambda: bool(ran))
    with pytest.raises(DeviceLost):
        await all_of(submitted(worker, losing, QueuedRequest(None, "b")))
    with pytest.raises(DeviceLost):
        await all_of(aside)
    assert await idle(worker)


@pytest.mark.usefixtures("short_turns")
async def test_draining_worker_finishes_suspended_requests(worker: DeviceWorker) -> None:
    ran, gate = list[str](), threading.Event()
    held = submitted(worker, stepping(ran, "a", until=gate), QueuedRequest(None, "a"))
    other = submitted(worker, stepping(ran, "b", until=gate), QueuedRequest(None, "b"))
    await come_true(lambda: {"a", "b"} <= set(ran))
    worker.refuse_new()
    gate.set()
    assert [await all_of(buffer) for buffer in (held, other)] == [[1], [1]]
    assert await idle(worker)


async def test_draining_worker_refuses_waiting_requests_at_once(worker: DeviceWorker) -> None:
    gate = threading.Event()
    running = submitted(worker, gated(gate, 1))
    await come_true(lambda: worker.in_flight == 1)
    waiting = submitted(worker, job(2))
    worker.refuse_new()
    with pytest.raises(ServerDraining, match="ask another replica"):
        await all_of(waiting)
    gate.set()
    assert await all_of(running) == [1]
    assert await idle(worker)


async def test_a_full_queue_refuses_at_once() -> None:
    worker, gate = DeviceWorker(max_waiting=2), threading.Event()
    buffers = [submitted(worker, gated(gate, 1)) for _ in range(3)]
    with pytest.raises(QueueFull, match="2 requests wait already") as refused:
        submitted(worker, job(1))
    assert refused.value.retry_after == SOONEST_RETRY
    assert worker.unfinished == 3
    gate.set()
    for buffer in buffers:
        assert await all_of(buffer) == [1]
    assert await all_of(submitted(worker, job(1))) == [1]


async def test_full_queue_returns_retry_info() -> None:
    worker, gate = DeviceWorker(max_waiting=2), threading.Event()
    for seconds in (2.0, 3.0, 4.5):
        submitted(worker, gated(gate, 1), QueuedRequest(None, cost=Cost(seconds)))
    with pytest.raises(QueueFull) as refused:
        submitted(worker, job(1))
    assert refused.value.retry_after == pytest.approx(9.5)
    gate.set()
    assert await idle(worker)


async def test_full_queue_replaces_a_request_of_the_caller_with_most_places() -> None:
    worker, gate = DeviceWorker(max_waiting=3), threading.Event()
    first = submitted(worker, gated(gate, 1), QueuedRequest(None, "many"))
    many = [submitted(worker, job(2), QueuedRequest(None, "many")) for _ in range(3)]
    few = [submitted(worker, job(3), QueuedRequest(None, "few")) for _ in range(2)]
    for given_up in many[1:]:
        with pytest.raises(QueueFull):
            await all_of(given_up)
    for caller in ("few", "many"):
        with pytest.raises(QueueFull):
            submitted(worker, job(4), QueuedRequest(None, caller))
    gate.set()
    assert [await all_of(buffer) for buffer in (first, many[0], *few)] == [[1], [2], [3], [3]]


async def test_ended_requests_take_no_place_in_a_full_queue() -> None:
    worker, gate = DeviceWorker(max_waiting=1), threading.Event()
    submitted(worker, gated(gate, 1))
    late = submitted(worker, job(2), QueuedRequest(0.0))
    timely = submitted(worker, job(3))
    with pytest.raises(DeadlinePassed):
        await all_of(late)
    gate.set()
    assert await all_of(timely) == [3]


async def test_draining_worker_finishes_its_requests_and_refuses_new_ones(
    worker: DeviceWorker,
) -> None:
    gate = threading.Event()
    running = submitted(worker, gated(gate, 1, 2))
    await come_true(lambda: worker.in_flight == 1)
    worker.refuse_new()
    with pytest.raises(ServerDraining):
        submitted(worker, job(1))
    assert worker.unfinished == 1
    gate.set()
    assert await all_of(running) == [1, 2]
    assert await idle(worker)
