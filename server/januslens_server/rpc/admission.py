"""Estimate the cost of requests, and refuse those above a limit."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from januslens_server.errors import (
    CancelCheck,
    CostLimit,
    LimitExceeded,
    LimitViolation,
    readable_size,
)
from januslens_server.models.chat import one_sandbox
from januslens_server.pipelines.cost import Demand, Pace, demand_of
from januslens_server.pipelines.resolve import Resolved
from januslens_server.results import Cost
from januslens_server.rpc.places import PREPARATION

# Maximum seconds in which the texts and interventions of a request are resolved, once a thread is
# free.
PREPARATION_SECONDS = 30.0

# Weight of one request in the running average of measured seconds relative to expected seconds.
LEARNING_RATE = 0.1

# In seconds. Shorter requests are not used, because other work on the machine affects them too
# much.
SHORTEST_LESSON = 0.001

# Maximum factor of one request, and of the correction of estimates. They limit how much the
# requests of one caller can change the estimates for others.
LARGEST_LESSON, LARGEST_CORRECTION = 100.0, 30.0


@dataclass(frozen=True)
class Limits:
    """Maximum cost of one request: device seconds, bytes on the device, bytes of the stream.

    If `memory` is None, the limit is the free memory.
    """

    seconds: float
    memory: int | None
    stream: int


ResolvedT = TypeVar("ResolvedT", bound=Resolved)
Resolve = Callable[[CancelCheck], ResolvedT]


@dataclass(frozen=True)
class Estimate(Generic[ResolvedT]):
    """A resolved request, its demand, and its expected cost on its device."""

    request: ResolvedT
    demand: Demand
    cost: Cost


class Admission:
    """Estimates the cost of requests before they queue, and corrects estimates by measured times.

    Seconds are computed from the demand and the model's pace. They are multiplied by a correction:
    the running average of measured time relative to estimated time, per model and RPC. Without
    correction, estimates are within a factor of three of the time on an idle machine, and usually
    within a factor of two (tests/numerics/test_cost.py).
    """

    def __init__(
        self, limits: Limits, paces: Mapping[str, Pace], free: Callable[[float], float]
    ) -> None:
        """`paces` gets an entry for each model when it is loaded.

        `free` returns the bytes that a request may use if it runs alone, given how many it needs.
        """
        self._limits = limits
        self._free = free
        self._paces = paces
        self._corrections: dict[tuple[str, type[Resolved]], float] = defaultdict(lambda: 1.0)

    async def admit(
        self, model: str, resolve: Resolve[ResolvedT], seconds: float | None
    ) -> Estimate[ResolvedT]:
        """Resolve and estimate a request, and check the limits.

        Raises `InvalidRequest` as `resolve` does, and `LimitExceeded` above a limit.
        """
        estimate = await self.estimate(model, resolve, seconds)
        if violations := list(self.exceeded(estimate.cost)):
            raise LimitExceeded(violations)
        return estimate

    async def estimate(
        self, model: str, resolve: Resolve[ResolvedT], seconds: float | None
    ) -> Estimate[ResolvedT]:
        """Resolve and estimate a request, in a thread because resolving tokenizes prompts.

        `seconds` is the time until the caller's deadline. Resolving stops there, when the call is
        cancelled, and after `PREPARATION_SECONDS`.
        """
        counted = partial(_counted, resolve)
        request, demand = await PREPARATION.run_cancellable(model, counted, seconds)
        pace, correction = self._paces[request.model.name], self._corrections[_key(request)]
        expected = pace.seconds(demand) * correction
        cost = Cost(expected, demand.memory, demand.stream, demand.held, demand.generated)
        return Estimate(request, demand, cost)

    def exceeded(self, cost: Cost) -> Iterator[LimitViolation]:
        """Yield each limit that the cost exceeds."""
        limits = self._limits
        if cost.seconds > limits.seconds:
            limit = CostLimit.MAX_REQUEST_SECONDS
            yield LimitViolation(
                limit,
                limits.seconds,
                cost.seconds,
                f"estimated at {cost.seconds:.3g} s, limit {limits.seconds:g} s of device time "
                f"({limit.value})",
            )
        device = "on the device"
        if limits.memory is not None and cost.memory > limits.memory:
            yield _larger(CostLimit.MAX_REQUEST_MEMORY, cost.memory, limits.memory, device)
        if cost.memory > (free := self._free(cost.memory)):
            yield _larger(CostLimit.FREE_MEMORY, cost.memory, max(0, free), device)
        if cost.stream > limits.stream:
            response = "for the response"
            yield _larger(CostLimit.MAX_REQUEST_STREAM, cost.stream, limits.stream, response)

    @property
    def configured_limits(self) -> dict[CostLimit, float]:
        """The limits of the settings, in seconds or bytes."""
        limits = {
            CostLimit.MAX_REQUEST_SECONDS: self._limits.seconds,
            CostLimit.MAX_REQUEST_STREAM: float(self._limits.stream),
            CostLimit.PREPARATION_SECONDS: PREPARATION_SECONDS,
        }
        if self._limits.memory is not None:
            limits[CostLimit.MAX_REQUEST_MEMORY] = float(self._limits.memory)
        return limits

    def forget(self, model: str) -> None:
        """Forget the corrections of a model that is unloaded; another may get its name."""
        for key in [key for key in list(self._corrections) if key[0] == model]:
            del self._corrections[key]

    def learn(self, request: Resolved, cost: Cost, seconds: float) -> None:
        """Correct later estimates by the measured device seconds of a request."""
        if min(cost.seconds, seconds) > SHORTEST_LESSON:
            ratio = _within(seconds / cost.seconds, LARGEST_LESSON) ** LEARNING_RATE
            key = _key(request)
            self._corrections[key] = _within(self._corrections[key] * ratio, LARGEST_CORRECTION)


def _within(ratio: float, factor: float) -> float:
    """Limit a ratio to the range from 1 / factor to factor."""
    return min(max(ratio, 1 / factor), factor)


def _counted(resolve: Resolve[ResolvedT], check_cancelled: CancelCheck) -> tuple[ResolvedT, Demand]:
    longest = time.monotonic() + PREPARATION_SECONDS

    def check() -> None:
        check_cancelled()
        over = time.monotonic() - longest
        if over > 0:
            raise LimitExceeded(
                [
                    LimitViolation(
                        CostLimit.PREPARATION_SECONDS,
                        PREPARATION_SECONDS,
                        PREPARATION_SECONDS + over,
                        f"preparing it took more than {PREPARATION_SECONDS:g} s",
                    )
                ],
                "send fewer texts, conversations or interventions",
            )

    with one_sandbox():
        request = resolve(check)
    return request, demand_of(request)


def _key(request: Resolved) -> tuple[str, type[Resolved]]:
    return request.model.name, type(request)


def _larger(limit: CostLimit, needed: float, allowed: float, of: str) -> LimitViolation:
    """Describe a size above its limit, in bytes where rounding hides the difference."""
    sizes = readable_size(needed), readable_size(allowed)
    if sizes[0] == sizes[1]:
        sizes = f"{needed:.0f} bytes", f"{allowed:.0f} bytes"
    text = f"estimated at up to {sizes[0]}, limit {sizes[1]} {of} ({limit.value})"
    return LimitViolation(limit, allowed, needed, text)
