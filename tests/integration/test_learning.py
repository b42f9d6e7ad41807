"""Estimated seconds follow the measured time of finished requests, by model and RPC."""

from __future__ import annotations

from dataclasses import astuple
from math import log
from typing import Any

import pytest

from januslens.v1 import common_pb2, cost_pb2, gradient_lens_pb2, trace_pb2
from januslens_server import telemetry
from januslens_server.pipelines.cost import Pace
from tests.support.calls import long_trace, prompt
from tests.support.in_process import Loaded, loaded, served

TRACE = trace_pb2.TraceRequest(input=prompt("The capital of Japan is the city of"))
NLL = gradient_lens_pb2.GradientLensRequest(
    input=TRACE.input,
    nll=gradient_lens_pb2.NegativeLogLikelihood(target=common_pb2.Target(text=" Paris")),
)
# Each request reduces the logarithm of the error by a tenth, so a factor of 8 becomes 1.3.
LESSONS = 20


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return loaded()


def misjudged(demo: Loaded, factor: float) -> Loaded:
    """The demo, with a pace that is too slow by this factor."""
    slower = Pace(*(factor * seconds for seconds in astuple(demo.paces["demo"])))
    return Loaded(demo.registry, {"demo": slower})


async def seconds(stub: Any, **request: Any) -> float:
    estimate = await stub.EstimateCost(cost_pb2.EstimateCostRequest(**request))
    return float(estimate.seconds)


async def traced(stub: Any) -> float:
    """Run a trace and return its device seconds."""
    before = telemetry.BUSY_SECONDS._value.get()
    assert [message async for message in stub.Trace(TRACE)]
    return float(telemetry.BUSY_SECONDS._value.get() - before)


@pytest.mark.parametrize("factor", [8.0, 1 / 8], ids=["too slow", "too fast"])
async def test_finished_requests_correct_a_wrong_pace(demo: Loaded, factor: float) -> None:
    async with served(misjudged(demo, factor)) as stub:
        first, of_gradient = (
            await seconds(stub, trace=TRACE),
            await seconds(stub, gradient_lens=NLL),
        )
        taken = sorted([await traced(stub) for _ in range(LESSONS)])[LESSONS // 2]
        last = await seconds(stub, trace=TRACE)
        assert await seconds(stub, gradient_lens=NLL) == of_gradient
    assert abs(log(last / taken)) < abs(log(first / taken)) / 2
    assert 1 / 3 < last / taken < 3
    assert (last < first) == (factor > 1)


async def test_one_request_moves_the_estimate_by_a_tenth(demo: Loaded) -> None:
    """A single slow request has little effect."""
    async with served(misjudged(demo, 8.0)) as stub:
        first = await seconds(stub, trace=TRACE)
        taken = await traced(stub)
        last = await seconds(stub, trace=TRACE)
    assert last == pytest.approx(first * (taken / first) ** 0.1, rel=1e-3)


async def test_unfinished_and_very_short_requests_do_not_change_estimates(demo: Loaded) -> None:
    async with served(misjudged(demo, 8.0)) as stub:
        first = await seconds(stub, trace=TRACE)
        call = stub.Trace(long_trace(10))
        await call.read()
        call.cancel()
        assert await seconds(stub, trace=TRACE) == first
    async with served(misjudged(demo, 1e-6)) as stub:
        first = await seconds(stub, trace=TRACE)
        await traced(stub)
        assert await seconds(stub, trace=TRACE) == first
