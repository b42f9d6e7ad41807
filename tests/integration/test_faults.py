"""Faults on the device end one request with its reason and leave nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2

from januslens.v1 import (
    activations_pb2,
    common_pb2,
    edits_pb2,
    gradient_lens_pb2,
    lens_pb2,
    sites_pb2,
    trace_pb2,
)
from januslens_server.models.failures import service_error
from januslens_server.results import ModelState, ModelStatus
from januslens_server.rpc.health import Health
from januslens_server.serving.assembly import on_device_lost
from tests.support.calls import prompt, timeless
from tests.support.in_process import Loaded, broken, hooks_of, loaded, refused, served

PROMPT = prompt("The capital of Japan is the city of")
PARIS = common_pb2.Target(text=" Paris")
REQUESTS: dict[str, Any] = {
    "Trace": trace_pb2.TraceRequest(input=PROMPT),
    "GradientLens": gradient_lens_pb2.GradientLensRequest(
        input=PROMPT, nll=gradient_lens_pb2.NegativeLogLikelihood(target=PARIS)
    ),
    "PreviewEdit": edits_pb2.PreviewEditRequest(
        input=PROMPT, target=PARIS, descent=edits_pb2.DescentStep(learning_rate=0.1)
    ),
    "Activations": activations_pb2.ActivationsRequest(
        input=PROMPT, sites=[sites_pb2.SITE_BLOCK_OUTPUT]
    ),
}
BLOCK = "transformer.h.2"


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return loaded()


def no_room_on_the_host(*_: Any) -> NoReturn:
    """An error as torch raises it."""
    torch.empty(1 << 60, dtype=torch.uint8)
    raise LookupError("expected no machine to have an exbibyte")


def no_room_on_the_gpu(*_: Any) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def accelerator_error(*_: Any) -> NoReturn:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def no_numbers(_module: Any, _args: Any, output: Any) -> Any:
    hidden, *rest = output if isinstance(output, tuple) else (output,)
    poisoned = hidden * torch.nan
    return (poisoned, *rest) if isinstance(output, tuple) else poisoned


async def answer(stub: Any, method: str) -> list[bytes]:
    call = getattr(stub, method)(REQUESTS[method])
    if hasattr(call, "__aiter__"):
        return [timeless(message) async for message in call]
    return [timeless(await call)]


FAULTS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "host out of memory": (no_room_on_the_host, "RESOURCE_EXHAUSTED", "OUT_OF_MEMORY"),
    "gpu out of memory": (no_room_on_the_gpu, "RESOURCE_EXHAUSTED", "OUT_OF_MEMORY"),
    "no numbers": (no_numbers, "FAILED_PRECONDITION", "NOT_FINITE"),
    "an error that passes": (accelerator_error, "INTERNAL", "INTERNAL"),
}


@pytest.mark.parametrize("method", REQUESTS)
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_ends_one_request_and_leaves_nothing_behind(
    demo: Loaded, fault: str, method: str
) -> None:
    fail, code, reason = FAULTS[fault]
    async with served(demo) as stub:
        before = await answer(stub, method)
        with broken(demo.network.get_submodule(BLOCK), fail):
            found = await refused(getattr(stub, method)(REQUESTS[method]))
            assert hooks_of(demo.network) == 1  # the failing hook
        assert (found.code.name, found.reason) == (code, reason)
        assert (found.retry_after is not None) == (reason == "OUT_OF_MEMORY")
        assert await answer(stub, method) == before  # bit-identical


async def test_a_backward_pass_with_nan_is_reported(demo: Loaded) -> None:
    """The forward pass is finite, and its gradients overflow."""
    module = demo.network.get_submodule(f"{BLOCK}.mlp")

    def poison(_module: Any, _args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.inf)

    async with served(demo) as stub:
        with broken(module, poison):
            found = await refused(stub.GradientLens(REQUESTS["GradientLens"]))
    assert (found.code.name, found.reason) == ("FAILED_PRECONDITION", "NOT_FINITE")
    assert "gradients" in found.text


async def test_a_lost_device_refuses_all_requests_and_reports_once(demo: Loaded) -> None:
    told: list[None] = []
    translate = partial(service_error, works=lambda: False)
    async with served(demo, translate=translate, on_loss=lambda: told.append(None)) as stub:
        with broken(demo.network.get_submodule(BLOCK), accelerator_error):
            calls = [stub.Trace(REQUESTS["Trace"]) for _ in range(3)]
            answers = await asyncio.gather(*map(refused, calls))
        answers.append(await refused(stub.Project(vectors())))  # although nothing fails now
    assert {(found.code.name, found.reason) for found in answers} == {
        ("UNAVAILABLE", "DEVICE_LOST")
    }
    assert all(found.retry_after for found in answers)
    assert "illegal" not in str(answers)
    assert told == [None]


async def test_a_lost_device_turns_health_off(caplog: pytest.LogCaptureFixture) -> None:
    health = Health()
    health.update([ModelStatus("demo", ModelState.READY)])
    lost = asyncio.Event()
    on_loss = on_device_lost(health, asyncio.get_running_loop(), lost)
    await asyncio.to_thread(on_loss)  # on another thread, like the device thread
    await asyncio.sleep(0.05)
    health.update([ModelStatus("demo", ModelState.READY)])  # another model may still load
    context: Any = None  # not used by Check
    for service in ("", "januslens.ready", "demo"):
        request = health_pb2.HealthCheckRequest(service=service)
        found = await health.Check(request, context)
        assert found.status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert lost.is_set()
    assert "the device has failed" in caplog.text


def vectors() -> lens_pb2.ProjectRequest:
    ones = common_pb2.Tensor(
        data_type=common_pb2.DATA_TYPE_FLOAT32, shape=[128], data=b"\x00\x00\x80?" * 128
    )
    return lens_pb2.ProjectRequest(vectors=ones)


async def test_out_of_memory_mid_stream_follows_the_computed_results(demo: Loaded) -> None:
    head, layers = type(demo.registry.get("demo").view.lens), list[int]()
    original = head.prepare

    def failing(self: Any, vectors: torch.Tensor, kind: Any) -> torch.Tensor:
        layers.append(len(vectors))
        if len(layers) == 4:
            no_room_on_the_gpu()
        return original(self, vectors, kind)

    async with served(demo) as stub:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head, "prepare", failing)
            events, error = await until_it_fails(stub.Trace(REQUESTS["Trace"]))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert events[0] == "header"
    assert set(events[1:]) == {"layer"}


async def until_it_fails(stream: Any) -> tuple[list[str], grpc.aio.AioRpcError]:
    events: list[str] = []
    try:
        async for message in stream:
            events.append(message.WhichOneof("event"))  # noqa: PERF401 - it ends with an error
    except grpc.aio.AioRpcError as error:
        return events, error
    raise LookupError(f"expected an error, got {events}")
