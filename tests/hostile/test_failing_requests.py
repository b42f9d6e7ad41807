"""Requests that fail at any stage, and extreme ones, change nothing for those that follow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

import grpc
import numpy as np
import pytest
import torch

from januslens.v1 import (
    activations_pb2,
    common_pb2,
    cost_pb2,
    edits_pb2,
    generation_pb2,
    gradient_lens_pb2,
    intervene_pb2,
    interventions_pb2,
    lens_pb2,
    neurons_pb2,
    sites_pb2,
    trace_pb2,
)
from januslens_server.access.callers import Caller, Quotas
from januslens_server.access.quotas import QuotaBook
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.cost import Demand, Pace
from januslens_server.pipelines.resolve import ResolvedTrace, resolve_trace
from januslens_server.results import Cost
from januslens_server.rpc import service, streaming
from januslens_server.rpc.admission import LARGEST_CORRECTION, LARGEST_LESSON, Admission
from januslens_server.rpc.encode import (
    ActivationsEncoder,
    GenerateEncoder,
    GradientLensEncoder,
    InterveneEncoder,
    TraceEncoder,
)
from januslens_server.rpc.unread import write_within
from januslens_server.specs import TraceSpec
from tests.support.calls import prompt, timeless
from tests.support.in_process import GENEROUS, Loaded, broken, loaded, served

PROMPT = prompt("The capital of Japan is the city of")
BLOCK_OUTPUT = sites_pb2.SITE_BLOCK_OUTPUT
ZERO = interventions_pb2.Intervention(site=BLOCK_OUTPUT, zero=True)
PARIS = common_pb2.Target(text=" Paris")
# Requests by RPC, and what encodes their results: an object and the name of its attribute.
REQUESTS: dict[str, tuple[Any, tuple[Any, str]]] = {
    "Trace": (trace_pb2.TraceRequest(input=PROMPT), (TraceEncoder, "encode")),
    "Intervene": (
        intervene_pb2.InterveneRequest(
            input=PROMPT, sweep=intervene_pb2.Sweep(template=ZERO, by_layer=True, by_position=True)
        ),
        (InterveneEncoder, "encode"),
    ),
    "Generate": (
        generation_pb2.GenerateRequest(input=PROMPT, max_new_tokens=8),
        (GenerateEncoder, "encode"),
    ),
    "GradientLens": (
        gradient_lens_pb2.GradientLensRequest(
            input=PROMPT,
            nll=gradient_lens_pb2.NegativeLogLikelihood(target=PARIS),
            modules=["mlp.c_fc", "attn.c_proj"],
            include_attention_gradients=True,
        ),
        (GradientLensEncoder, "encode"),
    ),
    "Activations": (
        activations_pb2.ActivationsRequest(input=PROMPT, sites=[BLOCK_OUTPUT]),
        (ActivationsEncoder, "encode"),
    ),
    "PreviewEdit": (
        edits_pb2.PreviewEditRequest(
            input=PROMPT, target=PARIS, shift=edits_pb2.ForwardShift(layer=1, eta=0.1)
        ),
        (service, "preview_edit_response"),
    ),
    "Project": (
        lens_pb2.ProjectRequest(
            vectors=common_pb2.Tensor(
                data_type=common_pb2.DATA_TYPE_FLOAT32,
                shape=[4, 128],
                data=np.linspace(-1, 1, 512, dtype="<f4").tobytes(),
            )
        ),
        (service, "project_response"),
    ),
    "FindNeurons": (
        neurons_pb2.FindNeuronsRequest(token=PARIS, page_size=5),
        (service, "find_neurons_response"),
    ),
}
UNARY = ("PreviewEdit", "Project", "FindNeurons")
WITHOUT_PASS = ("Project", "FindNeurons")


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return loaded()


@pytest.fixture
async def stub(demo: Loaded) -> AsyncIterator[Any]:
    async with served(demo) as found:
        yield found


def started(stub: Any, rpc: str) -> Any:
    request, _ = REQUESTS[rpc]
    return getattr(stub, rpc)(request)


async def results(stub: Any, rpc: str) -> list[bytes]:
    call = started(stub, rpc)
    if rpc in UNARY:
        return [(await call).SerializeToString(deterministic=True)]
    return [timeless(message) async for message in call]


async def fails(call: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await (_ended(call) if hasattr(call, "__aiter__") else call)


async def _ended(stream: Any) -> None:
    async for _ in stream:
        pass


async def at_decoding(stub: Any, rpc: str, _demo: Loaded, _patch: pytest.MonkeyPatch) -> None:
    empty = type(REQUESTS[rpc][0])()
    await fails(getattr(stub, rpc)(empty))


async def at_resolving(stub: Any, rpc: str, _demo: Loaded, _patch: pytest.MonkeyPatch) -> None:
    request, _ = REQUESTS[rpc]
    long = common_pb2.Input(token_ids=common_pb2.TokenIds(ids=[1] * 1000))
    changed = type(request)()
    changed.CopyFrom(request)
    match rpc:
        case "Project":
            changed.vectors.shape[:] = [8, 64]
        case "FindNeurons":
            changed.token.text = "two words"
        case _:
            changed.input.CopyFrom(long)
    await fails(getattr(stub, rpc)(changed))


def without_numbers(_module: Any, _args: Any, output: Any) -> Any:
    return output * torch.nan


async def in_the_forward_pass(
    stub: Any, rpc: str, demo: Loaded, _patch: pytest.MonkeyPatch
) -> None:
    with broken(demo.network.get_submodule("transformer.h.2.mlp"), without_numbers):
        await fails(started(stub, rpc))


async def in_the_projection(stub: Any, rpc: str, demo: Loaded, patch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = demo.registry.get("demo")
    vars(model).pop("neurons", None)  # else FindNeurons projects nothing
    with patch.context() as patched:
        patched.setattr(type(model.view.lens), "prepare", fail)
        await fails(started(stub, rpc))


async def between_two_projections(
    stub: Any, rpc: str, demo: Loaded, patch: pytest.MonkeyPatch
) -> None:
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
        await fails(started(stub, rpc))
    assert next(calls) > 2


async def in_the_backward_pass(
    stub: Any, rpc: str, demo: Loaded, _patch: pytest.MonkeyPatch
) -> None:
    """The gradients of the last layers are found before those of a middle one fail."""
    reached: list[torch.Tensor] = []

    def fail(gradient: torch.Tensor) -> NoReturn:
        reached.append(gradient)
        raise torch.OutOfMemoryError("CUDA out of memory")

    def fail_later(_module: Any, _args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(fail)

    with broken(demo.network.get_submodule("transformer.h.2.mlp"), fail_later):
        await fails(started(stub, rpc))
    assert reached


async def at_encoding(stub: Any, rpc: str, _demo: Loaded, patch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> NoReturn:
        raise KeyError("encoder")

    with patch.context() as patched:
        patched.setattr(*REQUESTS[rpc][1], fail)
        await fails(started(stub, rpc))


async def at_writing(stub: Any, rpc: str, _demo: Loaded, patch: pytest.MonkeyPatch) -> None:
    if rpc in UNARY:
        call = started(stub, rpc)
        await call.initial_metadata()
        call.cancel()
    else:
        await _cancelled_at_second_message(stub, rpc, patch)


async def _cancelled_at_second_message(stub: Any, rpc: str, patch: pytest.MonkeyPatch) -> None:
    """Without the wait, a short stream may end before it is cancelled, and then succeeds."""
    write, writes = write_within, iter(range(100))
    second, cancelled = asyncio.Event(), asyncio.Event()

    async def write_first(*given: Any) -> None:
        if next(writes) == 0:
            return await write(*given)
        second.set()
        try:
            await asyncio.Event().wait()  # until gRPC cancels the handler
        finally:
            cancelled.set()

    with patch.context() as patched:
        patched.setattr(streaming, "write_within", write_first)
        call = started(stub, rpc)
        await call.read()
        await second.wait()
        call.cancel()
        await cancelled.wait()


OF_ALL_RPCS = [at_decoding, at_resolving, at_encoding, at_writing]
FAILURES = [
    *((rpc, stage) for rpc in REQUESTS for stage in OF_ALL_RPCS),
    *((rpc, in_the_forward_pass) for rpc in REQUESTS if rpc not in WITHOUT_PASS),
    *((rpc, in_the_projection) for rpc in ("Trace", "GradientLens", *WITHOUT_PASS)),
    ("Trace", between_two_projections),
    ("GradientLens", in_the_backward_pass),
]
every_failure = pytest.mark.parametrize(
    ("rpc", "stage"), FAILURES, ids=[f"{rpc} {stage.__name__}" for rpc, stage in FAILURES]
)


async def seen(stub: Any, rpc: str) -> tuple[float, bytes]:
    """Return the state that callers can observe: an estimate, and the neuron index."""
    estimated = rpc if rpc not in UNARY else "Trace"  # EstimateCost has streams only
    field = "gradient_lens" if estimated == "GradientLens" else estimated.lower()
    request = cost_pb2.EstimateCostRequest(**{field: REQUESTS[estimated][0]})
    estimate = await stub.EstimateCost(request)
    return estimate.seconds, (await results(stub, "FindNeurons"))[0]


@every_failure
async def test_failed_request_changes_no_estimate_and_no_result(
    demo: Loaded,
    stub: Any,
    rpc: str,
    stage: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = await results(stub, rpc)
    vars(demo.registry.get("demo")).pop("rows", None)  # its rows are computed again
    before = await seen(stub, rpc)
    for _ in range(3):
        await stage(stub, rpc, demo, monkeypatch)
    assert await seen(stub, rpc) == before
    assert await results(stub, rpc) == expected
    assert await results(stub, rpc) == expected


class Overestimated(Pace):
    """Estimates a hundred times the real time of a request."""

    def seconds(self, demand: Demand) -> float:
        return 100 * super().seconds(demand)


@every_failure
async def test_failed_request_is_charged_its_device_time(
    demo: Loaded, rpc: str, stage: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It no longer counts as open, and its estimate is given back."""
    allowance = 6000.0
    quotas = Quotas(concurrent=1, device_seconds_per_minute=allowance)
    caller, book = Caller(name="ada", tokens=(), quotas=quotas), QuotaBook(now=lambda: 0.0)
    slow: dict[str, Pace] = {name: Overestimated(**vars(pace)) for name, pace in demo.paces.items()}
    async with served(Loaded(demo.registry, slow), caller=caller, quotas=book) as stub:
        began = time.monotonic()
        await stage(stub, rpc, demo, monkeypatch)
        while book._open:  # noqa: ASYNC110 - a cancelled request leaves after its current step
            await asyncio.sleep(0.01)
        elapsed = time.monotonic() - began
        book.charge(caller, 0.0)
        assert 0 <= allowance - book._seconds["ada"]._level <= elapsed
        assert await results(stub, rpc)


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
