"""Measure the memory that requests add to a server that has just loaded its model."""

from __future__ import annotations

from collections.abc import Iterator

from tests.benchmarks.bench import Bench
from tests.benchmarks.memory import MIB
from tests.benchmarks.report import Row

GOAL = 150.0


def measure(bench: Bench) -> Iterator[Row]:
    """Must run first, because the server keeps memory that earlier requests allocated."""
    ids, client, server = bench.shape.tokens(bench.shape.prompt), bench.client, bench.server
    loaded = server.resident
    beside = f"the loaded server's {loaded / MIB:.0f} MiB"
    gradient = server.peak(lambda: client.gradient_lens(ids, [7], components=0)) - loaded
    yield Row("GradientLens, memory beyond the loaded model", gradient / MIB, "MiB", GOAL, beside)
    trace = server.peak(lambda: client.trace(ids)) - loaded
    yield Row("Trace, memory beyond the loaded model", trace / MIB, "MiB", None, beside)
