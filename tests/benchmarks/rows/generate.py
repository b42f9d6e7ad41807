"""Generate tokens greedily, without and with a reading of all layers."""

from __future__ import annotations

from collections.abc import Iterator

from tests.benchmarks.bench import Bench
from tests.benchmarks.report import Row
from tests.benchmarks.timing import interleaved

NEW = 32


def measure(bench: Bench) -> Iterator[Row]:
    """Client time compared with transformers' `generate` in this process."""
    ids, layers = bench.shape.tokens(bench.shape.prompt), len(bench.model.view.blocks)
    new = min(NEW, len(bench.client.generate(ids, max_new_tokens=NEW)))
    taken = interleaved(
        {
            "transformers": lambda: bench.floors.generate(ids, new),
            "client": lambda: bench.client.generate(ids, max_new_tokens=new),
            "reading": lambda: bench.client.generate(ids, max_new_tokens=new, layers="all"),
        },
        bench.rounds,
    )
    beside = f"transformers' generate, {taken['transformers']:.2f} s"
    name = f"Generate {new} tokens, {bench.shape.name}"
    ratio = taken["client"] / taken["transformers"]
    yield Row(name, ratio, "x", 1.15, beside, taken)
    ratio = taken["reading"] / taken["transformers"]
    yield Row(f"Read {layers} layers at {new} generated tokens", ratio, "x", 1.5, beside, taken)
