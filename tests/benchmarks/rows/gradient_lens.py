"""GradientLens of FF1 and FF2 in all layers: time, and memory beyond the loaded model."""

from __future__ import annotations

from collections.abc import Iterator

from tests.benchmarks.bench import Bench
from tests.benchmarks.engine import run_gradient
from tests.benchmarks.report import Row
from tests.benchmarks.timing import interleaved

TARGET = 7


def measure(bench: Bench) -> Iterator[Row]:
    """Measure with the factors of every position projected, as in the paper."""
    ids, floors = bench.shape.tokens(bench.shape.prompt), bench.floors
    matrices = run_gradient(bench.model, ids, TARGET)
    count = sum(len(matrix.components.positions) for matrix in matrices)
    rows = floors.rows(count)

    def ask() -> object:
        return bench.client.gradient_lens(ids, [TARGET], components=0)

    taken = interleaved(
        {
            "backward": lambda: floors.backward(ids, TARGET),
            "product": lambda: floors.product(rows),
            "client": ask,
            "engine": lambda: run_gradient(bench.model, ids, TARGET),
        },
        bench.rounds,
    )
    floor = taken["backward"] + taken["product"]
    beside = (
        f"activation-only backward {taken['backward']:.3f} s + GEMM of {count} rows "
        f"{taken['product']:.3f} s"
    )
    kinds = " and ".join(dict.fromkeys(matrix.kind.name for matrix in matrices))
    name = f"GradientLens, {kinds} of all layers, as the client sees it"
    yield Row(name, taken["client"] / floor, "x", 1.25, beside, taken)
    engine = taken["engine"] / floor
    yield Row("GradientLens, the engine alone", engine, "x", None, "the same", taken)
