"""Trace every position of a long prompt: time per projected row, and memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from time import perf_counter

import januslens
from tests.benchmarks.bench import Bench
from tests.benchmarks.memory import MIB
from tests.benchmarks.report import Row
from tests.benchmarks.timing import interleaved


def measure(bench: Bench) -> Iterator[Row]:
    """Alternate between all positions and the last one alone, as the client observes them."""
    ids, client = bench.shape.tokens(bench.shape.long_prompt), bench.client
    taken = interleaved({"one position": lambda: client.trace(ids)}, bench.rounds)
    one = taken["one position"] / _projected(client.trace(ids).layers)
    before = bench.server.resident
    found: list[float] = []
    peak = bench.server.peak(lambda: found.append(_seconds_for_each_row(client, ids)))
    yield Row(
        f"All {len(ids)} positions of {bench.shape.layers} layers, time for each projected row",
        found[0] / one,
        "x",
        1.2,
        f"the last position alone: {1e3 * one:.3f} ms a row",
        taken | {"each row, all": found[0], "each row, one": one},
    )
    yield Row(
        f"All {len(ids)} positions, memory beyond one position's",
        (peak - before) / MIB,
        "MiB",
        None,
        f"the server's {before / MIB:.0f} MiB before",
    )


def _seconds_for_each_row(client: januslens.Client, ids: tuple[int, ...]) -> float:
    started, rows = perf_counter(), 0
    with client.stream_trace(ids, positions="all") as stream:
        for event in stream:
            if isinstance(event, januslens.LayerGraph):
                rows += _projected([event])
    return (perf_counter() - started) / rows


def _projected(layers: Iterable[januslens.LayerGraph]) -> int:
    return sum(node.projection is not None for layer in layers for node in layer.node_list)
