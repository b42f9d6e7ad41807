"""Track and enforce callers' quotas. Use it from the event loop only."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from januslens_server.access.callers import Caller
from januslens_server.errors import QuotaSpent

MINUTE = 60.0
# Retry delay for a caller with too many concurrent requests, in seconds.
CONCURRENT_RETRY = 1.0


class Bucket:
    """A token bucket that fills evenly and holds one minute's allowance."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._limit = 0.0
        self._level = 0.0
        self._at = now()

    def fill(self, per_minute: float, least: float = 0.0) -> None:
        """Add the allowance for the time since the last call.

        The level rises no higher than one minute's allowance or `least`, whichever is larger.
        """
        now, full = self._now(), max(per_minute, least)
        fresh = self._limit == 0.0
        self._level = full if fresh else self._level + (now - self._at) * per_minute / MINUTE
        self._level = min(self._level, full)
        self._limit, self._at = per_minute, now

    def wait_for(self, amount: float) -> float:
        """Seconds until `amount` is available; 0 if it already is."""
        return max(0.0, amount - self._level) * MINUTE / self._limit

    def take(self, amount: float) -> None:
        """Take `amount`, or return it if negative; the level may fall below 0."""
        self._level -= amount


class QuotaBook:
    """Usage of the quotas by caller name; reloading the callers' file does not reset it."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """`now` returns a time in seconds that never decreases."""
        self._open: defaultdict[str, int] = defaultdict(int)
        self._requests: defaultdict[str, Bucket] = defaultdict(lambda: Bucket(now))
        self._seconds: defaultdict[str, Bucket] = defaultdict(lambda: Bucket(now))
        self._generated: defaultdict[str, Bucket] = defaultdict(lambda: Bucket(now))

    @contextmanager
    def request(self, caller: Caller) -> Iterator[None]:
        """Count a request while it is open.

        Raises `QuotaSpent` if the caller has too many requests open or has made too many in the
        last minute.
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
            raise QuotaSpent(caller.name, f"{limit} concurrent requests", CONCURRENT_RETRY)

    def _check_rate(self, caller: Caller) -> None:
        limit = caller.quotas.requests_per_minute
        if limit is None:
            return
        bucket = self._requests[caller.name]
        bucket.fill(limit, least=1.0)
        if (wait := bucket.wait_for(1.0)) > 0:
            raise QuotaSpent(caller.name, f"{limit:g} requests a minute", wait)
        bucket.take(1.0)

    def charge(self, caller: Caller, seconds: float, generated: int = 0) -> None:
        """Charge the estimated device seconds of a request and the tokens that it may generate.

        A caller that has any allowance left may exceed it, and then waits longer for the
        next request. Without this rule, a request above one minute's allowance could never run.
        Raises `QuotaSpent` if no allowance is left.
        """
        quotas, name = caller.quotas, caller.name
        if (limit := quotas.device_seconds_per_minute) is not None:
            _require_some(self._seconds[name], caller, limit, "device seconds")
        if (limit := quotas.generated_tokens_per_minute) is not None and generated:
            _require_some(self._generated[name], caller, limit, "generated tokens")
        self.settle(caller, seconds, generated)

    def settle(self, caller: Caller, seconds: float, generated: int = 0) -> None:
        """Charge the differences between a request's actual figures and those charged before."""
        if caller.quotas.device_seconds_per_minute is not None:
            self._seconds[caller.name].take(seconds)
        if caller.quotas.generated_tokens_per_minute is not None:
            self._generated[caller.name].take(generated)


def _require_some(bucket: Bucket, caller: Caller, limit: float, what: str) -> None:
    """Raise `QuotaSpent` if nothing is left in the bucket."""
    bucket.fill(limit)
    if (wait := bucket.wait_for(0.0)) > 0:
        raise QuotaSpent(caller.name, f"{limit:g} {what} a minute", wait)
