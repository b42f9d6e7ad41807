"""Whose request the device takes next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Waiting items by caller; the caller who has had the least of the device is next.

    Every caller has an account of the seconds it was charged. Who comes back with nothing waiting
    starts at the level of the caller served last: idling is no credit, and waiting no loss. This is
    start-time fair queueing (Goyal, Vin & Cheng 1996), charged with what was really used. Not
    thread-safe.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}
        self._accounts: dict[str, float] = {}
        self._level = 0.0

    def __iter__(self) -> Iterator[T]:
        """All that wait, each caller's in order."""
        for items in self._waiting.values():
            yield from items

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, caller: str, item: T, *, first: bool = False) -> None:
        """Put an item behind the caller's others, or before them."""
        if caller not in self._waiting:
            self._waiting[caller] = deque()
            self._accounts[caller] = max(self._accounts.get(caller, 0.0), self._level)
        items = self._waiting[caller]
        (items.appendleft if first else items.append)(item)

    def in_order(self) -> list[str]:
        """The callers, the next one first; among equal ones the one who has waited longest."""
        return sorted(self._waiting, key=self._accounts.__getitem__)

    def first(self, caller: str) -> T:
        """A waiting caller's next item."""
        return self._waiting[caller][0]

    def pop(self, caller: str | None = None) -> T:
        """Take out the next item, or if a caller is given, that one's."""
        if caller is None:
            caller = self.in_order()[0]
        self._level = max(self._level, self._accounts[caller])
        item = self._waiting[caller].popleft()
        if self._waiting[caller]:
            # To the end of the order, so that equals take turns.
            self._waiting[caller] = self._waiting.pop(caller)
        self._tidy(caller)
        return item

    def remove(self, caller: str, item: T) -> None:
        """Take an item out; raises `ValueError` if it does not wait."""
        items = self._waiting.get(caller, deque())
        items.remove(item)
        self._tidy(caller)

    def charge(self, caller: str, seconds: float) -> None:
        """The caller has had the device for so long."""
        self._accounts[caller] = max(self._accounts.get(caller, 0.0), self._level) + seconds

    def has_had_less(self, caller: str, than: str) -> bool:
        """Whether `caller` should have the device rather than the other."""
        account = self._accounts.get(caller, self._level)
        return account < self._accounts.get(than, self._level)

    def _tidy(self, caller: str) -> None:
        """Forget callers who have nothing waiting and would start at the level anyway."""
        if not self._waiting.get(caller):
            self._waiting.pop(caller, None)
        idle = [name for name in self._accounts if name not in self._waiting]
        for name in idle:
            if self._accounts[name] <= self._level:
                del self._accounts[name]
