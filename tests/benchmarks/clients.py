"""Many callers against one at a time, on the demo: `python -m tests.benchmarks.clients [SECONDS]`.

Both take turns against one server. A caller sends its next trace when the last one has ended, so
that with many of them the queue is never empty; meanwhile health is asked twenty times a second.
Client and server share the machine's cores.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.table import Table

from januslens.v1 import service_pb2_grpc, trace_pb2
from tests.support.calls import prompt
from tests.support.server import running_server

CALLERS = (1, 32)
ROUNDS = 3
SECONDS = 6.0
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
class Round:
    """What one number of callers met in `seconds`: latencies and health's, in seconds."""

    seconds: float
    traces: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Traces a second."""
        return len(self.traces) / self.seconds


async def measure(address: str, callers: int, seconds: float) -> Round:
    """Let so many callers ask for a while; what they get while they begin does not count."""
    found = Round(seconds)
    began = time.perf_counter() + SETTLING
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_health(address, found, began))
        for number in range(callers):
            tasks.create_task(_caller(address, number, found, began))
    return found


async def _caller(address: str, number: int, found: Round, began: float) -> None:
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


async def _health(address: str, found: Round, began: float) -> None:
    async with grpc.aio.insecure_channel(address, OWN_CONNECTION) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # typed for synchronous channels only
        while (started := time.perf_counter()) < began + found.seconds:
            await stub.Check(health_pb2.HealthCheckRequest())
            found.health.append(time.perf_counter() - started)
            await asyncio.sleep(0.05)


def row(callers: int, rounds: list[Round]) -> list[str]:
    """Medians over the rounds; percentiles over all of their requests."""
    traces = sorted(latency for found in rounds for latency in found.traces)
    health = sorted(latency for found in rounds for latency in found.health)
    return [
        str(callers),
        f"{statistics.median(found.throughput for found in rounds):.1f}",
        *(f"{1000 * traces[int(share * (len(traces) - 1))]:.0f}" for share in (0.5, 0.99)),
        *(f"{1000 * health[int(share * (len(health) - 1))]:.1f}" for share in (0.5, 0.99)),
    ]


def main() -> None:
    """Print the table and the ratio."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS
    rounds: dict[int, list[Round]] = {callers: [] for callers in CALLERS}
    with running_server() as server:
        for _ in range(ROUNDS):
            for callers in CALLERS:
                rounds[callers].append(asyncio.run(measure(server.address, callers, seconds)))
    table = Table("callers", "traces/s", "p50, ms", "p99, ms", "health p50, ms", "health p99, ms")
    for callers in CALLERS:
        table.add_row(*row(callers, rounds[callers]))
    one, many = (statistics.median(r.throughput for r in rounds[callers]) for callers in CALLERS)
    Console().print(table)
    Console().print(f"{CALLERS[1]} callers get {many / one:.2f} x the traces of one; goal 1.5 x")


if __name__ == "__main__":
    main()
