"""Ten thousand requests, a third of them cancelled: the server's memory stops growing."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc

from januslens.v1 import common_pb2, gradient_lens_pb2, lens_pb2, service_pb2_grpc, trace_pb2
from tests.support.calls import prompt, timeless
from tests.support.memory import open_files, resident_bytes
from tests.support.metrics import sample, wait_until_idle
from tests.support.server import ServerProcess

REQUESTS = 10_000
CANCELLED = 0.3
AT_ONCE = 8
MAY_GROW = 10 * 2**20

PARIS = common_pb2.Target(text=" Paris")
OUTPUTS = [trace_pb2.NODE_KIND_BLOCK_OUTPUT]
MIXED: list[tuple[str, Any]] = [
    ("Trace", trace_pb2.TraceRequest(input=prompt("Japan"), layers=[3])),
    ("Trace", trace_pb2.TraceRequest(input=prompt("The capital of Japan"), node_kinds=OUTPUTS)),
    (
        "GradientLens",
        gradient_lens_pb2.GradientLensRequest(
            input=prompt("The capital of Japan"),
            nll=gradient_lens_pb2.NegativeLogLikelihood(target=PARIS),
            layers=[1],
        ),
    ),
    (
        "Project",
        lens_pb2.ProjectRequest(
            vectors=common_pb2.Tensor(
                data_type=common_pb2.DATA_TYPE_FLOAT32, shape=[128], data=b"\x00\x00\x80?" * 128
            )
        ),
    ),
]


async def answered(stub: Any, method: str, request: Any) -> list[bytes]:
    call = getattr(stub, method)(request, timeout=60)
    if hasattr(call, "__aiter__"):
        return [timeless(message) async for message in call]
    return [timeless(await call)]


async def given_up(stub: Any, method: str, request: Any, after: float) -> None:
    """Cancel a request while it waits, computes or is written; some have finished before."""
    call = getattr(stub, method)(request, timeout=60)
    await asyncio.sleep(after)
    call.cancel()
    assert await call.code() in {grpc.StatusCode.CANCELLED, grpc.StatusCode.OK}


async def asked(address: str, count: int, seed: int, expected: list[list[bytes]]) -> None:
    draws, remaining = random.Random(seed), iter(range(count))

    async def one_after_the_other(stub: Any) -> None:
        for _ in remaining:
            which = draws.randrange(len(MIXED))
            if draws.random() < CANCELLED:
                await given_up(stub, *MIXED[which], draws.uniform(0, 0.05))
            else:
                assert await answered(stub, *MIXED[which]) == expected[which]

    async with grpc.aio.insecure_channel(address) as channel:
        stub = service_pb2_grpc.IntrospectionServiceStub(channel)
        await asyncio.gather(*(one_after_the_other(stub) for _ in range(AT_ONCE)))


async def test_memory_stops_growing_and_results_stay_equal(soaked: ServerProcess) -> None:
    async with grpc.aio.insecure_channel(soaked.address) as channel:
        stub = service_pb2_grpc.IntrospectionServiceStub(channel)
        expected = [await answered(stub, method, request) for method, request in MIXED]
    held = []
    for half in range(2):
        await asked(soaked.address, REQUESTS // 2, half, expected)
        wait_until_idle(soaked)
        held.append(resident_bytes(soaked))
        print(f"{REQUESTS // 2 * (half + 1)} requests: {held[-1] / 2**20:.1f} MiB")
    assert held[1] - held[0] <= MAY_GROW
    assert open_files(soaked) < 100
    for gauge in ("januslens_queue_depth", "januslens_in_flight"):
        assert sample(soaked, gauge) == 0
    assert "Traceback" not in soaked.log
