"""Deadlines and cancellation stop a request within one layer, forward and backward."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
import torch

from januslens.v1 import common_pb2, gradient_lens_pb2, trace_pb2
from januslens_server.results import MatrixKind
from tests.support.calls import prompt
from tests.support.in_process import Loaded, loaded, served

PROMPT = prompt("The capital of Japan is the city of")
TRACE = trace_pb2.TraceRequest(input=PROMPT)
NLL = gradient_lens_pb2.GradientLensRequest(
    input=PROMPT,
    nll=gradient_lens_pb2.NegativeLogLikelihood(target=common_pb2.Target(text=" Paris")),
    matrices=[int(MatrixKind.FF2)],  # type: ignore[list-item]  # the numbers are the contract's
)
N_LAYERS = 4
DEADLINE = 0.5


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return loaded()


class Held:
    """Records the layers that are reached, and blocks the device in the first until released."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.reached, self.released = threading.Event(), threading.Event()

    def __call__(self, layer: int) -> None:
        self.layers.append(layer)
        self.reached.set()
        assert self.released.wait(10)


@contextmanager
def held_forward(demo: Loaded) -> Iterator[Held]:
    held = Held()
    handles = [
        demo.network.get_submodule(f"transformer.h.{layer}").register_forward_hook(
            lambda *_, layer=layer: held(layer)
        )
        for layer in range(N_LAYERS)
    ]
    yield held
    for handle in handles:
        handle.remove()


@contextmanager
def held_backward(demo: Loaded) -> Iterator[Held]:
    """Block at the gradient of each layer's input to FF2, right below the captured output."""
    held = Held()

    def hook(layer: int, tensor: torch.Tensor) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda _gradient: held(layer))

    handles = [
        demo.network.get_submodule(f"transformer.h.{layer}.mlp.c_proj").register_forward_pre_hook(
            lambda _module, args, layer=layer: hook(layer, args[0])
        )
        for layer in range(N_LAYERS)
    ]
    yield held
    for handle in handles:
        handle.remove()


CASES = {
    "forward": (held_forward, "Trace", TRACE, 0),
    "backward": (held_backward, "GradientLens", NLL, N_LAYERS - 1),
}


@pytest.mark.parametrize("how", ["cancel", "deadline"])
@pytest.mark.parametrize("where", CASES)
async def test_cancelled_request_stops_before_the_next_layer(
    demo: Loaded, where: str, how: str
) -> None:
    holding, method, request, first = CASES[where]
    async with served(demo) as stub:
        with holding(demo) as held:
            timeout = DEADLINE if how == "deadline" else 30
            call: Any = getattr(stub, method)(request, timeout=timeout)
            reading = asyncio.ensure_future(read(call))
            assert await asyncio.to_thread(held.reached.wait, 10)
            if how == "cancel":
                call.cancel()
            await reading  # the caller is told at once, while the device still computes
            await asyncio.sleep(0.1)
            held.released.set()
            # `served` waits until no request is unfinished and none of our hooks is registered.
            await asyncio.sleep(0.3)
        assert held.layers == [first]
    expected = grpc.StatusCode.CANCELLED if how == "cancel" else grpc.StatusCode.DEADLINE_EXCEEDED
    assert await call.code() is expected


async def read(call: Any) -> None:
    try:
        async for _ in call:
            pass
    except (grpc.aio.AioRpcError, asyncio.CancelledError):
        pass
