"""Measure many callers compared with a single one, on the demo.

The single caller uses a server of one process, and the better result of one core and of all cores
counts. Many callers use the same server, and one with a process per core. The measurements
alternate. A caller sends its next trace when the last one has ended, so with many callers the queue
is never empty. Meanwhile, health is checked twenty times a second. Clients and servers share the
cores of the machine.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from januslens.v1 import service_pb2_grpc, trace_pb2
from tests.benchmarks.bench import Bench
from tests.benchmarks.report import Row
from tests.support.calls import prompt
from tests.support.server import running_server

CORES = os.cpu_count() or 1
CALLERS = 32
ONE_CORE, ALL_CORES = ("--threads", "1"), ("--threads", str(CORES))
PROCESSES = ("--processes", str(CORES), "--threads", "1")
SERVERS = tuple(dict.fromkeys((ONE_CORE, ALL_CORES, PROCESSES)))
# The flags of a server, and the number of its callers.
Turn = tuple[tuple[str, ...], int]
TURNS: tuple[Turn, ...] = (
    *((flags, 1) for flags in dict.fromkeys((ONE_CORE, ALL_CORES))),
    (ONE_CORE, CALLERS),
    (PROCESSES, CALLERS),
)
SECONDS = 4.0
SETTLING = 2.0
PROMPTS = (
    "The capital of Japan is the city of",
    "Lionel Messi plays for",
    "The capital of Peru is the city of",
    "When Mary and John went to the store, John gave a drink to",
)
# Separate connections, as for callers on several machines.
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


@dataclass
class Load:
    """The latencies of traces and of health checks, in seconds, with one number of callers."""

    seconds: float
    traces: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Traces per second."""
        return len(self.traces) / self.seconds


async def loaded(address: str, callers: int, seconds: float) -> Load:
    """Let this many callers send traces for a while; results of the warm-up are not counted."""
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
            number += 1


async def _health(address: str, found: Load, began: float) -> None:
    async with grpc.aio.insecure_channel(address, OWN_CONNECTION) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # typed for synchronous channels only
        while (started := time.perf_counter()) < began + found.seconds:
            await stub.Check(health_pb2.HealthCheckRequest())
            found.health.append(time.perf_counter() - started)
            await asyncio.sleep(0.05)


def measure(bench: Bench) -> Iterator[Row]:
    """Yield the throughput relative to that of one caller, and further figures without a goal."""
    turns: dict[Turn, list[Load]] = {turn: [] for turn in TURNS}
    with ExitStack() as running:
        servers = {flags: running.enter_context(running_server(*flags)) for flags in SERVERS}
        for _ in range(bench.rounds):
            for (flags, callers), loads in turns.items():
                loads.append(asyncio.run(loaded(servers[flags].address, callers, SECONDS)))
    one = max(_rate(loads) for (_, callers), loads in turns.items() if callers == 1)
    yield from _rows("one process", turns[ONE_CORE, CALLERS], one, goal=None)
    yield from _rows(f"{CORES} processes", turns[PROCESSES, CALLERS], one, goal=1.5)


def _rate(loads: Sequence[Load]) -> float:
    return statistics.median(load.throughput for load in loads)


def _rows(name: str, loads: Sequence[Load], one: float, goal: float | None) -> Iterator[Row]:
    name, many = f"demo, {CALLERS} callers, {name}", _rate(loads)
    beside = f"one caller's {one:.1f} traces/s"
    yield Row(f"{name}: traces a second", many / one, "x", goal, beside, at_least=True)
    latency = percentile(0.99, (seconds for load in loads for seconds in load.traces))
    yield Row(f"{name}: p99 of a trace", latency, "s", None, f"{many:.1f} traces/s")
    health = percentile(0.99, (seconds for load in loads for seconds in load.health))
    yield Row(f"{name}: p99 of a health answer", 1000 * health, "ms", 50, "meanwhile")


def percentile(share: float, values: Iterable[float]) -> float:
    """Return the value that this fraction of the values do not exceed."""
    ordered = sorted(values)
    return ordered[int(share * (len(ordered) - 1))]
