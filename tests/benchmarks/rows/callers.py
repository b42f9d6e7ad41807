"""Many callers against one at a time, on the demo.

Both take turns against one server. A caller sends its next trace when the last one has ended, so
that with many of them the queue is never empty; meanwhile health is asked twenty times a second.
Client and server share the machine's cores.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from januslens.v1 import service_pb2_grpc, trace_pb2
from tests.benchmarks.bench import Bench
from tests.benchmarks.report import Row
from tests.support.calls import prompt
from tests.support.server import running_server

CALLERS = (1, 32)
SECONDS = 4.0
SETTLING = 2.0
PROMPTS = (
    "The capital of Japan is the city of",
    "Lionel Messi plays for",
    "The capital of Peru is the city of",
    "When Mary and John went to the store, John gave a drink to",
)
# Connections of their own, as callers on several machines have them.
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


@dataclass
class Load:
    """What one number of callers met in `seconds`: latencies and health's, in seconds."""

    seconds: float
    traces: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Traces a second."""
        return len(self.traces) / self.seconds


async def loaded(address: str, callers: int, seconds: float) -> Load:
    """Let so many callers ask for a while; what they get while they begin does not count."""
    found = Load(seconds)
    began = time.perf_counter() + SETTLING
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_health(address, found, began))
        for number in range(callers):
            tasks.create_task(_caller(address, number, found, began))
    return found


async def _caller(address: str, number: int, found: Load, began: float) -> None:
    async with grpc.aio.insecure_channel(address, OWN_CONNECTION) as channel:
        stub = service_pb2_grpc.IntrospectionServiceStub(channel)
        while (started := time.perf_counter()) < began + found.seconds:
            request = trace_pb2.TraceRequest(input=prompt(PROMPTS[number % len(PROMPTS)]))
            async for _ in stub.Trace(request):
                pass
            ended = time.perf_counter()
            if began < ended < began + found.seconds:
                found.traces.append(ended - started)
            number += len(CALLERS)


async def _health(address: str, found: Load, began: float) -> None:
    async with grpc.aio.insecure_channel(address, OWN_CONNECTION) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # typed for synchronous channels only
        while (started := time.perf_counter()) < began + found.seconds:
            await stub.Check(health_pb2.HealthCheckRequest())
            found.health.append(time.perf_counter() - started)
            await asyncio.sleep(0.05)


def measure(bench: Bench) -> Iterator[Row]:
    """Throughput as a ratio of one caller's; the rest is reported beside it."""
    rounds: dict[int, list[Load]] = {callers: [] for callers in CALLERS}
    with running_server() as server:
        for _ in range(bench.rounds):
            for callers in CALLERS:
                rounds[callers].append(asyncio.run(loaded(server.address, callers, SECONDS)))
    one, many = (
        statistics.median(load.throughput for load in rounds[callers]) for callers in CALLERS
    )
    name, beside = f"demo, {CALLERS[1]} callers", f"one caller's {one:.1f} traces/s"
    yield Row(f"{name}: traces a second", many / one, "x", 1.5, beside, at_least=True)
    latency = percentile(0.99, (seconds for load in rounds[CALLERS[1]] for seconds in load.traces))
    yield Row(f"{name}: p99 of a trace", latency, "s", None, f"{many:.1f} traces/s")
    health = percentile(0.99, (seconds for load in rounds[CALLERS[1]] for seconds in load.health))
    yield Row(f"{name}: p99 of a health answer", 1000 * health, "ms", 50, "meanwhile")


def percentile(share: float, values: Iterable[float]) -> float:
    """The value that this share of all do not exceed."""
    ordered = sorted(values)
    return ordered[int(share * (len(ordered) - 1))]
