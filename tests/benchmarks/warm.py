"""A trace whose weight rows were met before: `python -m tests.benchmarks.warm [THREADS]`.

On a random model of GPT-2 small's shape, 16 tokens, all layers at the last position. The floor is a
plain forward pass and one product of all vectors that a trace reads. Everything takes turns; the
figures are medians, of the clock and of the processor's time, which other work disturbs less.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from januslens_server.models.loading import ModelSource, load
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.trace import trace
from januslens_server.results import LayerGraph
from januslens_server.specs import TraceSpec
from tests.benchmarks.capacity import gpt2_sized

ROUNDS = 5
IDS = tuple(range(100, 116))
OTHER_TARGET = 777
GOAL = 0.7

Times = dict[str, list[tuple[float, float]]]


def vectors_read(model: ResidentModel) -> int:
    """How many vectors the trace takes to the vocabulary."""
    events = trace(model, TraceSpec(IDS), lambda: None)
    return sum(len(e.projections.projected) for e in events if isinstance(e, LayerGraph))


def actions(model: ResidentModel) -> dict[str, Callable[[], object]]:
    """What takes turns."""
    vectors = torch.randn(vectors_read(model), model.view.facts.d_model)
    head, ids = model.view.lens.unembedding, torch.tensor([IDS])
    without = replace(model, row_cache_bytes=0)
    other = TraceSpec(IDS, target=(OTHER_TARGET,))
    return {
        "forward": lambda: model.network(ids, use_cache=False),
        "product": lambda: vectors @ head.T,
        "cold": lambda: list(trace(without, TraceSpec(IDS), lambda: None)),
        "warm": lambda: list(trace(model, TraceSpec(IDS), lambda: None)),
        "warm, another target": lambda: list(trace(model, other, lambda: None)),
    }


def measure(model: ResidentModel) -> Times:
    """Wall-clock and processor seconds of each action, after a turn that does not count."""
    every = actions(model)
    taken: Times = {name: [] for name in every}
    for turn in range(ROUNDS + 1):
        for name, action in every.items():
            began = time.perf_counter(), time.process_time()
            action()
            if turn:
                taken[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return taken


def main() -> None:
    """Print each trace as a ratio of the floor."""
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model = load(ModelSource("gpt2", str(gpt2_sized(Path(folder)))))
        taken = measure(model)
    table = Table("trace", "seconds", "x floor", "processor seconds", "x floor")
    clocks = [
        {name: statistics.median(pair[clock] for pair in pairs) for name, pairs in taken.items()}
        for clock in (0, 1)
    ]
    for name in taken:
        cells = [name]
        for clock in clocks:
            floor = clock["forward"] + clock["product"]
            cells += [f"{clock[name]:.3f}", f"{clock[name] / floor:.2f}"]
        table.add_row(*cells)
    Console().print(table)
    Console().print(f"goal: warm at most {GOAL} x the floor of forward and product")


if __name__ == "__main__":
    main()
