"""Measure what one process can build, encode and send, with a model whose arithmetic takes no time.

On a GPU the arithmetic of a trace takes tens of milliseconds, so what Python does for each node
limits the traces a second of one process. A model that is narrow, but has as many layers and heads
as a large one, leaves little but that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import januslens
from januslens_server.pipelines.resolve import resolve_trace
from januslens_server.pipelines.trace import trace
from januslens_server.results import LayerGraph
from januslens_server.rpc.encode import TraceEncoder
from januslens_server.specs import TraceSpec
from tests.benchmarks.bench import Bench
from tests.benchmarks.engine import run_trace
from tests.benchmarks.report import Row
from tests.benchmarks.timing import interleaved

CALLERS = 8
# From tensors on the host to bytes on the wire.
GOAL = 15.0


def measure(bench: Bench) -> Iterator[Row]:
    """Yield microseconds for each node: of the engine, of encoding, and of the whole service."""
    ids = bench.shape.tokens(bench.shape.prompt)
    model, spec = bench.model, TraceSpec(ids)
    events = [event for event in trace(resolve_trace(model, spec), _go_on) if event is not None]
    nodes = sum(len(event.nodes) for event in events if isinstance(event, LayerGraph))

    def encoded() -> list[bytes]:
        encoder = TraceEncoder("benchmark", model.vocabulary.token)
        return [message for event in events for message in encoder.encode(event)]

    taken = interleaved(
        {
            "engine": lambda: run_trace(model, spec),
            "forward": lambda: bench.floors.forward(ids),
            "encoding": encoded,
            "one caller": lambda: asyncio.run(_served(bench, 1)),
            "callers": lambda: asyncio.run(_served(bench, CALLERS)),
        },
        bench.rounds,
    )
    beside = f"{bench.shape.name}, {nodes} nodes; the pass {1e3 * taken['forward']:.1f} ms"
    each = {name: 1e6 * seconds / nodes for name, seconds in taken.items()}
    yield Row("Each node, from results to bytes", each["encoding"], "µs", GOAL, beside, taken)
    yield Row("Each node, from tokens to results", each["engine"], "µs", None, beside, taken)
    name = "Each node, as one caller sees it"
    yield Row(name, each["one caller"], "µs", None, beside, taken)
    many = nodes * CALLERS / taken["callers"]
    name = f"Nodes a second that one process sends to {CALLERS} callers"
    yield Row(name, many, "nodes", None, f"{CALLERS / taken['callers']:.1f} traces/s", taken)


async def _served(bench: Bench, callers: int) -> float:
    ids = bench.shape.tokens(bench.shape.prompt)
    async with januslens.AsyncClient(bench.address) as client:
        began = time.perf_counter()
        await asyncio.gather(*(client.trace(ids) for _ in range(callers)))
        return time.perf_counter() - began


def _go_on() -> None:
    """A cancellation check that never cancels."""
