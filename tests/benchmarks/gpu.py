"""Run the GPU benchmarks with Llama-2-7B's shape in bfloat16: `python -m tests.benchmarks.gpu`.

Creates a random model (13.5 GB in `--out`), serves it from the GPU and also loads it in this
process, so the GPU must hold it twice. Without a GPU, prints an error and exits with status 2.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click
import torch

from januslens_server.specs import TraceSpec
from tests.benchmarks.bench import Bench, bench, machine
from tests.benchmarks.engine import run_gradient, run_trace
from tests.benchmarks.report import Row, show, write
from tests.benchmarks.shapes import LLAMA_2_7B
from tests.benchmarks.timing import interleaved

TARGET = 7


@click.command(help="Measure the goals of docs/performance.md on this machine's GPU.")
@click.option("--rounds", default=10, show_default=True, help="Turns that each thing takes.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/bench"))
def main(rounds: int, out: Path) -> None:
    """Measure, print the table, and write the results to a file."""
    if not torch.cuda.is_available():
        click.echo("needs a GPU: torch finds no CUDA device", err=True)
        raise SystemExit(2)
    threads = os.cpu_count() or 1
    with bench(LLAMA_2_7B, out / "models", rounds, threads, "cuda", "bfloat16") as measured:
        rows = list(measure(measured))
    show(rows, machine(threads))
    write(rows, machine(threads), out / "gpu.json")


def measure(bench: Bench) -> Iterator[Row]:
    """Return the engine's times in milliseconds, and those that the client observes."""
    ids, floors = bench.shape.tokens(bench.shape.prompt), bench.floors
    spec = TraceSpec(ids, include_logit_contribution=True)
    taken = interleaved(
        {
            "forward": lambda: floors.forward(ids),
            "backward": lambda: floors.backward(ids, TARGET),
            "trace": lambda: run_trace(bench.model, spec),
            "trace, client": lambda: bench.client.trace(ids),
            "gradient": lambda: run_gradient(bench.model, ids, TARGET),
            "gradient, client": lambda: bench.client.gradient_lens(ids, [TARGET], components=0),
        },
        bench.rounds,
    )
    yield from _rows("Trace, last position, the engine", "trace", 50.0, "forward", taken)
    yield from _rows("GradientLens GATE, UP, FF2, the engine", "gradient", 60.0, "backward", taken)
    yield Row(
        "GPU memory held by this process",
        torch.cuda.memory_reserved() / 2**20,
        "MiB",
        None,
        f"weights {_weights(bench) / 2**20:.0f} MiB; the rest is workspace",
    )


def _rows(
    name: str, action: str, goal: float, floor: str, taken: dict[str, float]
) -> Iterator[Row]:
    beside = f"plain {floor} {1e3 * taken[floor]:.1f} ms"
    yield Row(name, 1e3 * taken[action], "ms", goal, beside, taken)
    seen = taken[f"{action}, client"]
    yield Row(f"{name}: as the client sees it", 1e3 * seen, "ms", None, beside, taken)


def _weights(bench: Bench) -> int:
    return sum(p.numel() * p.element_size() for p in bench.model.network.parameters())


if __name__ == "__main__":
    main()
