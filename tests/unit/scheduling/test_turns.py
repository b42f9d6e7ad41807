"""Test which request starts, continues or pauses if memory is limited."""

from __future__ import annotations

import pytest

from januslens_server.results import Cost
from januslens_server.scheduling.job import Job, QueuedRequest, ResultBuffer
from januslens_server.scheduling.turns import QUANTUM, Turns

MEMORY = 10


@pytest.fixture
def turns() -> Turns:
    return Turns(lambda _needed: MEMORY)


async def waiting(turns: Turns, caller: str, held: int, working: int = 0) -> Job:
    """A request with this estimate of bytes, which waits for its first turn."""
    request = QueuedRequest(None, caller, Cost(1.0, memory=held + working, held=held))
    job = Job(iter(()), ResultBuffer(1, lambda _: 1), request)
    turns.add(job)
    return job


async def test_started_request_precedes_others_of_its_caller(turns: Turns) -> None:
    first, second = [await waiting(turns, "a", 1) for _ in range(2)]
    assert turns.take() is first
    turns.add(first)
    assert [turns.take(), turns.take()] == [first, second]
    assert turns.started == 2


async def test_request_yields_to_another_caller_after_its_time_slice(turns: Turns) -> None:
    long = await waiting(turns, "a", 1)
    turns.take()
    assert not turns.gives_way(long, 10 * QUANTUM)  # nobody waits
    await waiting(turns, "a", 1)
    turns.charge(long, QUANTUM)
    assert not turns.gives_way(long, QUANTUM)  # only another of its own caller
    await waiting(turns, "b", 1)
    assert not turns.gives_way(long, 0.9 * QUANTUM)
    assert turns.gives_way(long, QUANTUM)


async def test_suspended_request_precedes_callers_with_equal_use(turns: Turns) -> None:
    mine, other = await waiting(turns, "a", 1), await waiting(turns, "b", 1)
    turns.charge(other, 2 * QUANTUM)
    assert turns.take() is mine
    turns.charge(mine, 2 * QUANTUM)
    assert not turns.gives_way(mine, 2 * QUANTUM)
    turns.charge(mine, QUANTUM)
    assert turns.gives_way(mine, 3 * QUANTUM)


async def test_request_does_not_yield_to_one_that_does_not_fit_beside_it(
    turns: Turns,
) -> None:
    long, large = await waiting(turns, "a", 6), await waiting(turns, "b", 6)
    turns.take()
    turns.charge(long, 1.0)
    assert not turns.gives_way(long, 1.0)
    turns.ended(long)
    assert turns.take() is large


async def test_working_memory_of_a_step_is_free_between_steps(turns: Turns) -> None:
    """Only one request computes at a time, and each of them needs room for its step."""
    first = await waiting(turns, "a", 2, working=7)
    assert turns.take() is first
    turns.charge(first, 1.0)
    fitting = await waiting(turns, "b", 1, working=7)
    assert turns.gives_way(first, 1.0)
    turns.add(first)
    assert turns.take() is fitting
    turns.charge(fitting, 1.5)
    larger = await waiting(turns, "c", 1, working=6)
    turns.remove(first)
    assert not turns.gives_way(fitting, 1.0)  # with it the first would lack room for its step
    turns.ended(first)
    assert turns.gives_way(fitting, 1.0)
    assert turns.take() is larger


async def test_large_request_is_not_overtaken_forever(turns: Turns) -> None:
    """While the next request has no room, later ones do not start, but started ones continue."""
    long = await waiting(turns, "a", 6)
    turns.take()
    turns.charge(long, 3.0)
    large, small = await waiting(turns, "b", 6), await waiting(turns, "c", 1)
    turns.charge(small, 1.0)
    assert not turns.gives_way(long, 3.0)
    turns.add(long)
    assert turns.take() is long
    turns.ended(long)
    assert [turns.take(), turns.take()] == [large, small]


async def test_no_request_starts_while_requests_waiting_for_readers_hold_the_memory(
    turns: Turns,
) -> None:
    at_its_reader, next_one = await waiting(turns, "a", 9), await waiting(turns, "b", 9)
    assert turns.take() is at_its_reader
    assert turns.take() is None
    assert turns.take_unstartable() is None
    turns.ended(at_its_reader)
    assert turns.take() is next_one


async def test_a_request_starts_only_if_its_memory_is_free_now() -> None:
    """Other programs may have taken memory that was free before."""
    free = 10.0
    turns = Turns(lambda _needed: free)
    small, large = await waiting(turns, "a", 2), await waiting(turns, "b", 2, working=5)
    assert turns.take() is small
    free = 6.0
    assert turns.take() is None
    assert turns.fits_alone(7) == 10.0
    free = 7.0
    assert turns.take() is large


async def test_request_that_does_not_fit_alone_fails(turns: Turns) -> None:
    larger = await waiting(turns, "a", 5, working=6)
    assert turns.take() is None
    assert turns.take_unstartable() is larger
    assert (len(turns), turns.started) == (0, 0)


async def test_started_requests_never_hold_more_than_the_limit() -> None:
    """This holds for any sequence of requests whose readers read."""
    turns, running, held = Turns(lambda _needed: MEMORY), None, set[Job]()
    for job in [await waiting(turns, "abcde"[i % 5], 1 + i * 7 % MEMORY) for i in range(200)]:
        running = running or turns.take()
        assert running is not None
        held.add(running)
        turns.charge(running, 0.3)
        assert sum(j.held for j in held) <= MEMORY
        if job.held % 3 == 0:
            turns.ended(running)
            held.remove(running)
            running = None
        elif turns.gives_way(running, 0.3):
            turns.add(running)
            running = None
    assert len(held) > 1


async def test_a_request_that_never_started_holds_nothing(turns: Turns) -> None:
    job = await waiting(turns, "a", 9)
    turns.remove(job)
    turns.ended(job)
    assert (len(turns), turns.started) == (0, 0)
