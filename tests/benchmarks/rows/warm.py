"""Trace with the logits of weight rows cached by the same earlier request."""

from __future__ import annotations

from collections.abc import Iterator

import januslens
from januslens_server.specs import TraceSpec
from tests.benchmarks.bench import LOADING_SECONDS, Bench
from tests.benchmarks.engine import projected_rows, run_trace
from tests.benchmarks.report import Row
from tests.benchmarks.timing import interleaved
from tests.support.server import running_server

OTHER_TARGET = 7


def measure(bench: Bench) -> Iterator[Row]:
    """Compare with a cold trace, and with its floor: a forward pass and one product of all rows."""
    ids, floors = bench.shape.tokens(bench.shape.prompt), bench.floors
    rows = floors.rows(projected_rows(run_trace(bench.model, TraceSpec(ids))))
    with (
        running_server(*bench.flags, seconds=LOADING_SECONDS) as server,
        januslens.Client(server.address) as client,
    ):
        taken = interleaved(
            {
                "forward": lambda: floors.forward(ids),
                "product": lambda: floors.product(rows),
                "cold": lambda: bench.client.trace(ids),
                "warm": lambda: client.trace(ids),
                "warm, another target": lambda: client.trace(ids, OTHER_TARGET),
            },
            bench.rounds,
        )
    yield Row(
        "The same trace again, warm, of a cold trace",
        taken["warm"] / taken["cold"],
        "x",
        0.7,
        f"a trace without a row cache, {taken['cold']:.3f} s",
        taken,
    )
    floor = taken["forward"] + taken["product"]
    beside = f"the cold floor, {floor:.3f} s"
    yield Row("The same trace again, warm", taken["warm"] / floor, "x", 0.7, beside, taken)
    another = taken["warm, another target"] / floor
    yield Row("The same, warm, with another target", another, "x", 0.7, beside, taken)
