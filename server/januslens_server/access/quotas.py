"""What callers have taken of what they may take. Used from the event loop alone."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from januslens_server.access.callers import Caller
from januslens_server.errors import QuotaSpent

MINUTE = 60.0
# When a caller with too many requests at once may ask again, in seconds.
CONCURRENT_RETRY = 1.0


class Bucket:
    """An allowance that fills up evenly, to a minute's worth (token bucket)."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._limit = 0.0
        self._level = 0.0
        self._at = now()

    def fill(self, per_minute: float, least: float = 0.0) -> None:
        """Add what has come since the last time; it holds `least` if a minute brings less."""
        now, full = self._now(), max(per_minute, least)
        fresh = self._limit == 0.0
        self._level = full if fresh else self._level + (now - self._at) * per_minute / MINUTE
        self._level = min(self._level, full)
        self._limit, self._at = per_minute, now

    def lacks(self, amount: float) -> float:
        """Seconds until there is so much; 0 if there is."""
        return max(0.0, amount - self._level) * MINUTE / self._limit

    def take(self, amount: float) -> None:
        """Take it, or give it back where it is negative; the level may fall below 0."""
        self._level -= amount


class QuotaBook:
    """Keeps each caller's accounts by name: a file that is read again does not reset them."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """`now` in seconds."""
        self._open: defaultdict[str, int] = defaultdict(int)
        self._requests: defaultdict[str, Bucket] = defaultdict(lambda: Bucket(now))
        self._seconds: defaultdict[str, Bucket] = defaultdict(lambda: Bucket(now))

    @contextmanager
    def request(self, caller: Caller) -> Iterator[None]:
        """Count a request from its beginning to its end.

        Raises `QuotaSpent` where the caller has as many open, or has made as many in this minute,
        as it may.
        """
        self._check_concurrent(caller)
        self._check_rate(caller)
        self._open[caller.name] += 1
        try:
            yield
        finally:
            self._open[caller.name] -= 1
            if not self._open[caller.name]:
                del self._open[caller.name]

    def _check_concurrent(self, caller: Caller) -> None:
        limit = caller.quotas.concurrent
        if limit is not None and self._open[caller.name] >= limit:
            raise QuotaSpent(caller.name, f"{limit} requests at once", CONCURRENT_RETRY)

    def _check_rate(self, caller: Caller) -> None:
        limit = caller.quotas.requests_per_minute
        if limit is None:
            return
        bucket = self._requests[caller.name]
        bucket.fill(limit, least=1.0)
        if (wait := bucket.lacks(1.0)) > 0:
            raise QuotaSpent(caller.name, f"{limit:g} requests a minute", wait)
        bucket.take(1.0)

    def charge(self, caller: Caller, seconds: float) -> None:
        """Take the seconds of the device that a request is expected to need.

        A caller who has any left may spend more than that, and then waits the longer: otherwise a
        request above a minute's worth could never run. Raises `QuotaSpent` where nothing is left.
        """
        limit = caller.quotas.device_seconds_per_minute
        if limit is None:
            return
        bucket = self._seconds[caller.name]
        bucket.fill(limit)
        if (wait := bucket.lacks(0.0)) > 0:
            raise QuotaSpent(caller.name, f"{limit:g} s of the device a minute", wait)
        bucket.take(seconds)

    def settle(self, caller: Caller, expected: float, used: float) -> None:
        """Charge what was really used in place of what was expected."""
        if caller.quotas.device_seconds_per_minute is not None:
            self._seconds[caller.name].take(used - expected)
