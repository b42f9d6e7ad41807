"""Requests that fail at any stage, and extreme ones, change nothing for those that follow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

import grpc
import pytest
import torch

from januslens.v1 import common_pb2, cost_pb2, neurons_pb2, trace_pb2
from januslens_server.access.callers import Caller, Quotas
from januslens_server.access.quotas import QuotaBook
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.cost import Demand, Pace
from januslens_server.pipelines.resolve import ResolvedTrace, resolve_trace
from januslens_server.results import Cost
from januslens_server.rpc.admission import LARGEST_CORRECTION, LARGEST_LESSON, Admission
from januslens_server.rpc.encode import TraceEncoder
from januslens_server.specs import TraceSpec
from tests.support.calls import prompt, timeless
from tests.support.in_process import GENEROUS, Loaded, broken, loaded, served

TRACE = trace_pb2.TraceRequest(input=prompt("The capital of Japan is the city of"))
NEURONS = neurons_pb2.FindNeuronsRequest(token=common_pb2.Target(text=" Paris"), page_size=5)


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return loaded()


@pytest.fixture
async def stub(demo: Loaded) -> AsyncIterator[Any]:
    async with served(demo) as found:
        yield found


async def fails(call: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        async for _ in call:
            pass


async def at_decoding(stub: Any, _demo: Loaded, _patch: pytest.MonkeyPatch) -> None:
    await fails(stub.Trace(trace_pb2.TraceRequest()))


async def at_admission(stub: Any, _demo: Loaded, _patch: pytest.MonkeyPatch) -> None:
    await fails(stub.Trace(trace_pb2.TraceRequest(input=prompt("Japan"), layers=[99])))


def without_numbers(_module: Any, _args: Any, output: Any) -> Any:
    return output * torch.nan


async def in_the_forward_pass(stub: Any, demo: Loaded, _patch: pytest.MonkeyPatch) -> None:
    with broken(demo.network.get_submodule("transformer.h.2.mlp"), without_numbers):
        await fails(stub.Trace(TRACE))


async def in_the_projection(stub: Any, demo: Loaded, patch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with patch.context() as patched:
        patched.setattr(type(demo.registry.get("demo").view.lens), "prepare", fail)
        await fails(stub.Trace(TRACE))


async def between_two_projections(stub: Any, demo: Loaded, patch: pytest.MonkeyPatch) -> None:
    """The first rows are in the row cache when the second ones fail."""
    model = demo.registry.get("demo")
    vars(model).pop("rows", None)
    prepare, calls = type(model.view.lens).prepare, iter(range(100))

    def fail(*given: Any, **named: Any) -> Any:
        if next(calls) >= 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prepare(*given, **named)

    with patch.context() as patched:
        patched.setattr(type(model.view.lens), "prepare", fail)
        await fails(stub.Trace(TRACE))
    assert next(calls) > 2


async def at_encoding(stub: Any, _demo: Loaded, patch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> NoReturn:
        raise KeyError("encoder")

    with patch.context() as patched:
        patched.setattr(TraceEncoder, "encode", fail)
        await fails(stub.Trace(TRACE))


async def at_writing(stub: Any, _demo: Loaded, _patch: pytest.MonkeyPatch) -> None:
    call = stub.Trace(TRACE)
    await call.read()
    call.cancel()


STAGES = [
    at_decoding,
    at_admission,
    in_the_forward_pass,
    in_the_projection,
    between_two_projections,
    at_encoding,
    at_writing,
]


async def seen(stub: Any) -> tuple[float, bytes]:
    """Return the state that callers can observe: an estimate, and the neuron index."""
    estimate = await stub.EstimateCost(cost_pb2.EstimateCostRequest(trace=TRACE))
    found = await stub.FindNeurons(NEURONS)
    return estimate.seconds, found.SerializeToString(deterministic=True)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
async def test_failed_request_does_not_change_estimates(
    demo: Loaded, stub: Any, stage: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await seen(stub)
    for _ in range(3):
        await stage(stub, demo, monkeypatch)
    assert await seen(stub) == before


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
async def test_a_failed_request_changes_no_later_result(
    demo: Loaded, stub: Any, stage: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [timeless(message) async for message in stub.Trace(TRACE)]
    vars(demo.registry.get("demo")).pop("rows", None)  # its rows are computed again
    await stage(stub, demo, monkeypatch)
    assert [timeless(message) async for message in stub.Trace(TRACE)] == before
    assert [timeless(message) async for message in stub.Trace(TRACE)] == before


class Overestimated(Pace):
    """Estimates a hundred times the real time of a request."""

    def seconds(self, demand: Demand) -> float:
        return 100 * super().seconds(demand)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
async def test_failed_request_is_charged_its_device_time(
    demo: Loaded, stage: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It no longer counts as open, and its estimate is given back."""
    allowance = 6000.0
    quotas = Quotas(concurrent=1, device_seconds_per_minute=allowance)
    caller, book = Caller(name="ada", tokens=(), quotas=quotas), QuotaBook(now=lambda: 0.0)
    slow: dict[str, Pace] = {name: Overestimated(**vars(pace)) for name, pace in demo.paces.items()}
    async with served(Loaded(demo.registry, slow), caller=caller, quotas=book) as stub:
        began = time.monotonic()
        await stage(stub, demo, monkeypatch)
        while book._open:  # noqa: ASYNC110 - a cancelled request leaves after its current step
            await asyncio.sleep(0.01)
        elapsed = time.monotonic() - began
        book.charge(caller, 0.0)
        assert 0 <= allowance - book._seconds["ada"]._level <= elapsed
        assert [message async for message in stub.Trace(TRACE)][-1].HasField("summary")


def test_extreme_requests_move_estimates_within_bounds(demo: Loaded) -> None:
    admission = Admission(GENEROUS, demo.paces, lambda needed: needed)
    model: ResidentModel = demo.registry.get("demo")
    request, expected = resolve_trace(model, TraceSpec(prompt="Japan")), Cost(1.0, 0, 0, 0)

    def learned(seconds: float, times: int) -> float:
        for _ in range(times):
            admission.learn(request, expected, seconds)
        return admission._corrections["demo", ResolvedTrace]

    assert learned(1e6, 1) == pytest.approx(LARGEST_LESSON**0.1)
    assert learned(1e6, 1000) == LARGEST_CORRECTION
    assert learned(0.002, 1000) == 1 / LARGEST_CORRECTION
