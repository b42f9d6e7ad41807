"""Tests of the fair queue: the caller with the least device time is next."""

from __future__ import annotations

import random

import pytest

from januslens_server.scheduling.turns import FairQueue


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
