"""Run all CPU benchmarks on this machine: `python -m tests.benchmarks`.

A random model with the shape of GPT-2 small is created, loaded in this process, and served over
loopback by another process. Floors and measurements alternate, and the figures are medians. The
module of a row has a function `measure` that takes a `Bench`; `ROWS`, `GENERATION` and `PER_NODE`
list the modules in the order in which they run. Generation is measured on a model of SmolLM2's
shape, and what one process can send on a narrow one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from tests.benchmarks.bench import bench, machine
from tests.benchmarks.report import Row, show, write
from tests.benchmarks.rows import (
    callers,
    experiments,
    generate,
    gradient_lens,
    positions,
    survey,
    throughput,
    trace,
    unprojected,
    warm,
    workspace,
)
from tests.benchmarks.shapes import GPT2_SMALL, NARROW, SMOLLM2_135M, TINY

# The first row measures memory, which later rows leave allocated.
ROWS = {
    "workspace": workspace.measure,
    "trace": trace.measure,
    "warm": warm.measure,
    "unprojected": unprojected.measure,
    "gradient": gradient_lens.measure,
    "positions": positions.measure,
    "experiments": experiments.measure,
    "callers": callers.measure,
    "survey": survey.measure,
}
# Rows that are measured on a model of SmolLM2's shape.
GENERATION = {"generate": generate.measure}
# Rows about what Python does for each node, on a model without arithmetic.
PER_NODE = {"throughput": throughput.measure}


@click.command(help="Measure the goals of docs/performance.md on this machine's CPU.")
@click.option(
    "--rows",
    "names",
    type=click.Choice([*ROWS, *GENERATION, *PER_NODE]),
    multiple=True,
    help="Only these.",
)
@click.option("--rounds", default=5, show_default=True, help="Turns that each thing takes.")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True, help="Cores to use.")
@click.option("--tiny", is_flag=True, help="A model of two small layers: to see that it runs.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("build/bench"),
    show_default=True,
    help="Folder of the model and the JSON.",
)
def main(names: Sequence[str], rounds: int, threads: int, tiny: bool, out: Path) -> None:
    """Measure, print the table, and write the results to a file."""
    rows: list[Row] = []
    parts = ((GPT2_SMALL, ROWS), (SMOLLM2_135M, GENERATION), (NARROW, PER_NODE))
    for shape, measures in parts:
        wanted = [name for name in names or measures if name in measures]
        if not wanted:
            continue
        with bench(TINY if tiny else shape, out / "models", rounds, threads) as measured:
            for name in wanted:
                click.echo(f"measuring {name} ...", err=True)
                rows += measures[name](measured)
    show(rows, machine(threads))
    write(rows, machine(threads), out / "bench.json")


if __name__ == "__main__":
    main()
