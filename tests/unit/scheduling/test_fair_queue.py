"""Tests of the fair queue: the caller with the least device time is next."""

from __future__ import annotations

import random
from itertools import count

import pytest

from januslens_server.scheduling.turns import QUANTUM, FairQueue


def queue_of(*items: str) -> FairQueue[str]:
    """Items `a1`, `b1`, ... of callers `a`, `b`."""
    queue: FairQueue[str] = FairQueue()
    for item in items:
        queue.add(item[0], item)
    return queue


def served(queue: FairQueue[str], seconds: float = 1.0) -> list[str]:
    """Return the items in the order served, charging each with its seconds."""
    order = []
    while len(queue):
        item = queue.pop()
        queue.charge(item[0], seconds)
        order.append(item)
    return order


def test_one_callers_items_come_in_order() -> None:
    assert served(queue_of("a1", "a2", "a3")) == ["a1", "a2", "a3"]


def test_equal_callers_take_turns_in_order_of_arrival() -> None:
    queue = queue_of("a1", "a2", "a3", "b1", "b2", "c1")
    assert served(queue) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_callers_without_charges_take_turns() -> None:
    assert served(queue_of("a1", "a2", "b1", "b2"), 0.0) == ["a1", "b1", "a2", "b2"]


def test_a_caller_of_cheap_requests_gets_more_of_them() -> None:
    queue = queue_of("a1", "a2", *(f"b{i}" for i in range(9)))
    order = []
    while len(queue):
        item = queue.pop()
        queue.charge(item[0], 3.0 if item[0] == "a" else 1.0)
        order.append(item[0])
    assert "".join(order) == "abbbabbbbbb"


def test_idle_callers_earn_no_credit() -> None:
    queue = queue_of("a1", "b1")
    served(queue)
    for i in range(10):
        queue.add("a", f"a{i}")
        served(queue)
    queue.add("a", "a9")
    for i in range(3):
        queue.add("b", f"b{i}")
    assert served(queue) == ["b0", "a9", "b1", "b2"]


def test_item_can_be_put_first_or_removed() -> None:
    queue = queue_of("a1", "a2", "a3", "b1")
    queue.add("a", "a0", first=True)
    queue.remove("a", "a2")
    queue.remove("b", "b1")
    with pytest.raises(ValueError, match="not in"):
        queue.remove("b", "b1")
    assert (len(queue), list(queue)) == (3, ["a0", "a1", "a3"])
    assert served(queue) == ["a0", "a1", "a3"]


def test_shares_are_equal_whenever_both_callers_wait() -> None:
    """Within the largest request of each, however long requests are (Goyal et al., theorem 1)."""
    draw = random.Random(7)
    queue: FairQueue[str] = FairQueue()
    for i in range(600):
        queue.add("abc"[i % 3], "abc"[i % 3])
    had = dict.fromkeys("abc", 0.0)
    for _ in range(300):
        caller = queue.pop()
        seconds = draw.expovariate(1.0) * {"a": 5, "b": 1, "c": 0.2}[caller]
        largest = 5 * 8.0
        queue.charge(caller, seconds)
        had[caller] += seconds
        assert max(had.values()) - min(had.values()) <= 2 * largest


def test_callers_without_items_are_removed() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(1000):
        queue.add(f"{i}", f"{i}")
        queue.charge(queue.pop(), 0.5)
    queue.add("z", "z")
    queue.add("z", "z")
    served(queue)
    assert len(queue._accounts) <= 2


def run_until_first_turn(queue: FairQueue[str], left: dict[str, float], item: str) -> list[float]:
    """Serve items in steps, as the worker does; return when each item began, up to `item`."""
    began: dict[str, float] = {}
    now = 0.0
    while True:
        served = queue.pop()
        began.setdefault(served, now)
        if served == item:
            return list(began.values())
        for steps in count(1):
            step = min(STEP, left[served])
            left[served] -= step
            now += step
            queue.charge(served[0], step)
            if left[served] <= 1e-9:
                break
            callers = queue.in_order()
            due = callers and queue.has_had_less(callers[0], served[0])
            if steps * STEP >= QUANTUM and due:
                queue.add(served[0], served, first=True)
                break


STEP = 0.02


@pytest.mark.parametrize("seed", range(12))
def test_expected_requests_ahead_are_those_that_run_before(seed: int) -> None:
    draw = random.Random(seed)
    names = [f"{draw.choice('abc')}{number}" for number in range(9)]
    seconds = {name: draw.choice([0.04, 0.5, 3.0]) for name in names}
    for item in names:
        queue = queue_of(*names)
        for caller in "abc":
            queue.charge(caller, draw.choice([0.0, 0.0, 1.0]))
        ahead = queue.ahead_of(item[0], item, seconds.__getitem__, None)
        # The estimate treats time as continuous; each caller can exceed its share by one turn.
        tolerance = 3 * (QUANTUM + STEP)
        began = run_until_first_turn(queue, dict(seconds), item)
        assert began[-1] == pytest.approx(sum(left for _, left in ahead), abs=tolerance)
        assert len(began) - 1 == pytest.approx(len(ahead), abs=1)


def test_the_running_request_is_ahead_of_every_waiting_one() -> None:
    queue = queue_of("b1", "b2")
    queue.charge("a", 5.0)
    seconds = {"a0": 2.0, "b1": 0.5, "b2": 1.0}.__getitem__
    assert queue.ahead_of("b", "b1", seconds, ("a", "a0")) == [("a0", QUANTUM)]
    assert queue.ahead_of("b", "b2", seconds, ("a", "a0")) == [("b1", 0.5), ("a0", QUANTUM)]
