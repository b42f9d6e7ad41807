"""Trace the last position in all layers: cold time, first message, and overhead of the wire."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator

import januslens
from januslens_server.specs import TraceSpec
from tests.benchmarks.bench import Bench
from tests.benchmarks.engine import projected_rows, run_trace
from tests.benchmarks.report import Row
from tests.benchmarks.timing import interleaved


def measure(bench: Bench) -> Iterator[Row]:
    """Client time compared with a plain forward pass and one product of the same rows."""
    ids = bench.shape.tokens(bench.shape.prompt)
    floors, spec = bench.floors, TraceSpec(ids, include_logit_contribution=True)
    layers = run_trace(bench.model, spec)
    count = projected_rows(layers)
    rows = floors.rows(count)
    first: list[float] = []
    taken = interleaved(
        {
            "forward": lambda: floors.forward(ids),
            "product": lambda: floors.product(rows),
            "client": lambda: first.append(_until_first_layer(bench.client, ids)),
            "engine": lambda: run_trace(bench.model, spec),
        },
        bench.rounds,
    )
    taken["first layer"] = statistics.median(first[1:])
    floor = taken["forward"] + taken["product"]
    nodes = sum(len(layer.nodes) for layer in layers)
    yield Row(
        f"Trace, cold: {len(bench.model.view.blocks)} layers, {nodes} nodes, as the client sees it",
        taken["client"] / floor,
        "x",
        1.25,
        f"HF forward {taken['forward']:.3f} s + GEMM of {count} rows {taken['product']:.3f} s",
        taken,
    )
    yield Row(
        "Trace, cold, the engine alone", taken["engine"] / floor, "x", None, "the same", taken
    )
    by_layer = taken["product"] / len(bench.model.view.blocks)
    yield Row(
        "First layer's message at the client",
        taken["first layer"] / (taken["forward"] + 1.5 * by_layer),
        "x",
        1.0,
        f"HF forward + 1.5 x GEMM of a layer's rows, {by_layer:.3f} s",
        taken,
    )
    yield Row(
        f"Wire: what the client waits beyond the engine, {nodes} nodes",
        taken["client"] / taken["engine"] - 1,
        "of it",
        0.10,
        f"the engine's {taken['engine']:.3f} s",
        taken,
    )


def _until_first_layer(client: januslens.Client, ids: tuple[int, ...]) -> float:
    """Return the seconds until the first layer arrives, and read the rest of the trace.

    The server would continue to compute a cancelled trace for a while, which would slow down the
    next measurement.
    """
    started, seconds = time.perf_counter(), math.nan
    with client.stream_trace(ids) as stream:
        for event in stream:
            if isinstance(event, januslens.LayerGraph) and math.isnan(seconds):
                seconds = time.perf_counter() - started
    return seconds
