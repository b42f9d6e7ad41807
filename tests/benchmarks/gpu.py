"""Test and measure the server on this machine's GPU, in one run: `python -m tests.benchmarks.gpu`.

The run ends by itself after `--seconds`, writes the JSON after every step, and leaves nothing else
behind. It first names the packages that are missing, then runs all tests that are marked `gpu`,
then measures: numbers of the GPU beside those of the CPU, concurrent traces and generation of a
model of 1 billion parameters, and a trace and gradients of Llama-2-7B's shape in bfloat16, of which
the GPU holds two copies. `--device cpu --tiny` runs the same steps on small models without a GPU.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from packaging.requirements import Requirement

import januslens
from januslens.errors import ResourceExhausted
from januslens_server.errors import never_cancelled
from januslens_server.models.loader import ModelSource, load
from januslens_server.models.placement import memory_needed
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.resolve import resolve_gradient_lens, resolve_trace
from januslens_server.pipelines.trace import trace
from januslens_server.results import GradientMatrix, LayerGraph
from januslens_server.specs import (
    GradientLensSpec,
    InterventionSpec,
    NegativeLogLikelihood,
    Scale,
    Site,
    TraceSpec,
)
from tests.benchmarks.bench import Bench, bench, machine
from tests.benchmarks.engine import run_gradient, run_trace
from tests.benchmarks.report import Row, show, write
from tests.benchmarks.rows import generate
from tests.benchmarks.shapes import LLAMA_1B, LLAMA_2_7B, LLAMA_SMALL, Shape, build
from tests.benchmarks.timing import interleaved

ROOT = Path(__file__).parents[2]
TARGET = 7
CALLERS = 32
# Relative to the largest number of a table. Both devices add float32 numbers, in different orders.
TOLERANCE = 1e-4


@dataclass
class Run:
    """What is measured where, and what was found so far."""

    device: str
    data_type: str
    rounds: int
    out: Path
    ends: float
    shapes: dict[str, Shape]
    rows: list[Row] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the run has to end."""
        return self.ends - time.monotonic()

    def save(self) -> None:
        """Write all that was found so far."""
        path = self.out / "gpu.json"
        write(self.rows, machine(os.cpu_count() or 1), path)
        written = json.loads(path.read_text()) | {"notes": self.notes}
        path.write_text(json.dumps(written, indent=2) + "\n")

    @contextmanager
    def bench(self, name: str) -> Iterator[Bench]:
        """Serve a model and load it here; its folder is removed afterwards."""
        folder = self.out / "gpu-models"
        threads, shape = os.cpu_count() or 1, self.shapes[name]
        try:
            with bench(shape, folder, self.rounds, threads, self.device, self.data_type) as made:
                yield made
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@click.command(help="Test and measure the server on this machine's GPU.")
@click.option("--rounds", default=10, show_default=True, help="Turns that each thing takes.")
@click.option("--seconds", default=440.0, show_default=True, help="Start no step after this time.")
@click.option("--device", default="cuda", show_default=True, help="Device of the models.")
@click.option("--tiny", is_flag=True, help="Small models: to see that it runs.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/bench"))
def main(rounds: int, seconds: float, device: str, tiny: bool, out: Path) -> None:
    """Run all steps, print the table, and write the results to a file."""
    if device == "cuda" and not torch.cuda.is_available():
        click.echo("needs a GPU: torch finds no CUDA device", err=True)
        raise SystemExit(2)
    out.mkdir(parents=True, exist_ok=True)
    shapes = {"1B": LLAMA_1B, "7B": LLAMA_2_7B}
    if tiny:
        shapes = dict.fromkeys(shapes, LLAMA_SMALL)
    data_type = "bfloat16" if device == "cuda" else "float32"
    run = Run(device, data_type, rounds, out, time.monotonic() + seconds, shapes)
    for name, step in STEPS.items():
        began = time.monotonic()
        if run.left <= 0:
            run.notes[name] = "not started: no time left"
            continue
        click.echo(f"{name} ...", err=True)
        try:
            run.rows += step(run)
        except Exception as error:  # noqa: BLE001 - a step that fails must not end the run
            run.notes[name] = f"failed: {type(error).__name__}: {error}"
        run.notes.setdefault(name, "done")
        run.notes[f"{name}, seconds"] = round(time.monotonic() - began, 1)
        run.save()
    show(run.rows, machine(os.cpu_count() or 1))
    for name, note in run.notes.items():
        click.echo(f"{name}: {note}")
    if any(str(note).startswith("failed") for note in run.notes.values()):
        raise SystemExit(1)


def packages(run: Run) -> list[Row]:
    """Name the packages that the server needs and this Python lacks."""
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*described["dependencies"], *described["optional-dependencies"]["server"]]
    missing = list[str]()
    for text in needed:
        wanted = Requirement(text)
        try:
            if not wanted.specifier.contains(version(wanted.name), prereleases=True):
                missing.append(f"{wanted} (found {version(wanted.name)})")
        except PackageNotFoundError:
            missing.append(str(wanted))
    run.notes["missing packages"] = missing
    run.notes["versions"] = {name: version(name) for name in ("torch", "transformers", "grpcio")}
    if missing:
        run.notes["packages"] = f"failed: missing {', '.join(missing)}"
    return []


def self_test(run: Run) -> list[Row]:
    """Run the tests that are marked `gpu`.

    Other files are not collected: they may need packages that this machine lacks. Releases that it
    has may warn of their own future.
    """
    files = (ROOT / "tests").rglob("test_*.py")
    marked = [str(path) for path in files if "@pytest.mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["-W", "default", *marked]
    limit = max(1.0, min(run.left, 150.0))
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        run.notes["self-test"] = f"failed: took more than {limit:.0f} s"
        return []
    output = done.stdout.strip().splitlines()
    run.notes["self-test"] = output[-1] if output else done.stderr[-500:]
    if done.returncode not in (0, 5):  # 5: no test was selected
        run.notes["self-test"] = "failed: " + "\n".join(output[-40:])
    return []


def exactness(run: Run) -> list[Row]:
    """Compare lens, shares, contributions, factors and interventions with those of the CPU."""
    folder = run.out / "gpu-models"
    try:
        path = build(LLAMA_SMALL, folder)
        source = ModelSource("exact", str(path), data_type="float32", row_cache_bytes=0)
        here, there = load(replace(source, device=run.device)), load(source)
        rows = []
        ids = LLAMA_SMALL.tokens(LLAMA_SMALL.prompt)
        for name, found in readings(ids).items():
            own, again, expected = found(here), found(here), found(there)
            pairs = zip(own, expected, strict=True)
            worst = max(difference(one, other) for one, other in pairs)
            title = f"{name}: largest difference from the CPU, of the largest number"
            rows.append(Row(title, worst, "", TOLERANCE, "float32 on the CPU"))
            turns = zip(own, again, strict=True)
            same = all(np.array_equal(one, other, equal_nan=True) for one, other in turns)
            title = f"{name}: repeats to the bit"
            rows.append(Row(title, float(same), "", 1.0, "", at_least=True))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def readings(ids: tuple[int, ...]) -> dict[str, Callable[[ResidentModel], list[Any]]]:
    """Return what is compared: functions from a model to arrays of numbers, by name."""
    changes = (InterventionSpec(Site.BLOCK_OUTPUT, Scale(0.5), layers=(0,)),)
    plain = TraceSpec(ids, include_logit_contribution=True)

    def traced(spec: TraceSpec) -> Callable[[ResidentModel], list[Any]]:
        def read(model: ResidentModel) -> list[Any]:
            events = trace(resolve_trace(model, spec), never_cancelled)
            found: list[Any] = []
            for layer in (event for event in events if isinstance(event, LayerGraph)):
                edges, table = layer.edges, layer.projections
                found += [layer.norms, edges.weights, edges.shares, edges.logit_contributions]
                found += [table.top_logits, table.entropy_bits, table.target_logits]
            return found

        return read

    def factors(model: ResidentModel) -> list[Any]:
        spec = GradientLensSpec(ids, NegativeLogLikelihood((TARGET,)), include_factors=True)
        events = gradient_lens(resolve_gradient_lens(model, spec), never_cancelled)
        matrices = [event for event in events if isinstance(event, GradientMatrix)]
        parts = [matrix.components for matrix in matrices]
        return [array for part in parts for array in (part.inputs, part.vjps, part.vjp_norms)]

    return {
        "lens, shares and contributions": traced(plain),
        "interventions": traced(replace(plain, interventions=changes)),
        "factors": factors,
    }


def difference(found: Any, expected: Any) -> float:
    """Return the largest difference, relative to the largest expected number."""
    if found.shape != expected.shape:
        return float("inf")
    size = np.nanmax(np.abs(expected), initial=0.0)
    return float(np.nanmax(np.abs(found - expected), initial=0.0) / (size or 1.0))


def one_billion(run: Run) -> list[Row]:
    """Measure concurrent traces, generation and running out of memory on a model of 1B."""
    rows = list[Row]()
    with run.bench("1B") as measured:
        rows += concurrent(measured)
        for row in generate.measure(measured):  # client time as a multiple of transformers'
            rows.append(replace(row, goal=1.25 if row.goal == 1.15 else None))
        if run.device == "cuda":
            rows += exhausted(measured)
    return rows


def concurrent(measured: Bench) -> list[Row]:
    """Compare the traces a second of many callers with those of one."""
    ids = measured.shape.tokens(measured.shape.prompt)
    address = measured.address

    async def callers(count: int, each: int) -> float:
        async with januslens.AsyncClient(address) as client:

            async def caller() -> None:
                for _ in range(each):
                    await client.trace(ids)

            await caller()
            began = time.perf_counter()
            await asyncio.gather(*(caller() for _ in range(count)))
            return count * each / (time.perf_counter() - began)

    one = asyncio.run(callers(1, measured.rounds))
    many = asyncio.run(callers(CALLERS, max(1, measured.rounds // 4)))
    name = f"{CALLERS} concurrent traces, {measured.shape.name}: traces a second"
    beside = f"one caller's {one:.1f} traces/s"
    return [Row(name, many / one, "x", 3.0, beside, at_least=True)]


def exhausted(measured: Bench) -> list[Row]:
    """Leave a request no memory on the GPU; it must fail alone, and the next one be served."""
    ids = measured.shape.tokens(measured.shape.long_prompt)
    expected = measured.client.trace(ids).header.targets[0]
    torch.cuda.empty_cache()
    taken = torch.empty(torch.cuda.mem_get_info()[0] - 2**26, dtype=torch.uint8, device="cuda")
    refused = False
    try:
        measured.client.trace(ids, positions="all")
    except ResourceExhausted:
        refused = True
    del taken
    torch.cuda.empty_cache()
    served = measured.client.trace(ids).header.targets[0] == expected
    name = "Out of memory: the request fails alone, the next one is served"
    return [Row(name, float(refused and served), "", 1.0, f"refused: {refused}", at_least=True)]


def seven_billion(run: Run) -> list[Row]:
    """Measure the engine and the client on Llama-2-7B's shape."""
    with run.bench("7B") as measured:
        return list(measure(measured, run.device))


def measure(measured: Bench, device: str) -> Iterator[Row]:
    """Return the engine's times in milliseconds, and those that the client observes."""
    ids, floors = measured.shape.tokens(measured.shape.prompt), measured.floors
    spec = TraceSpec(ids, include_logit_contribution=True)
    taken = interleaved(
        {
            "forward": lambda: floors.forward(ids),
            "backward": lambda: floors.backward(ids, TARGET),
            "trace": lambda: run_trace(measured.model, spec),
            "trace, client": lambda: measured.client.trace(ids),
            "gradient": lambda: run_gradient(measured.model, ids, TARGET),
            "gradient, client": lambda: measured.client.gradient_lens(ids, [TARGET], components=0),
        },
        measured.rounds,
    )
    yield from _rows("Trace, last position, the engine", "trace", 50.0, 80.0, "forward", taken)
    name = "GradientLens GATE, UP, FF2, the engine"
    yield from _rows(name, "gradient", 60.0, None, "backward", taken)
    if device == "cuda":
        yield _memory(measured)


def _rows(
    name: str,
    action: str,
    goal: float,
    client_goal: float | None,
    floor: str,
    taken: dict[str, float],
) -> Iterator[Row]:
    beside = f"plain {floor} {1e3 * taken[floor]:.1f} ms"
    yield Row(name, 1e3 * taken[action], "ms", goal, beside, taken)
    seen = taken[f"{action}, client"]
    yield Row(f"{name}: as the client sees it", 1e3 * seen, "ms", client_goal, beside, taken)


def _memory(measured: Bench) -> Row:
    """Compare the most memory that torch allocated for requests with the estimate at load."""
    model = measured.model
    need = memory_needed(model.network, model.view.lens.chunk_bytes, 0).on("cuda:0")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ids = measured.shape.tokens(measured.shape.prompt)
    run_trace(model, TraceSpec(ids, include_logit_contribution=True))
    peak = torch.cuda.max_memory_allocated()
    beside = (
        f"estimate {need}; allocated {before / 2**20:.0f} MiB before a trace, "
        f"{peak / 2**20:.0f} MiB during it"
    )
    return Row("GPU memory, of the estimate", peak / need.total, "x", 1.05, beside)


STEPS: dict[str, Callable[[Run], list[Row]]] = {
    "packages": packages,
    "self-test": self_test,
    "exactness": exactness,
    "1B": one_billion,
    "7B": seven_billion,
}


if __name__ == "__main__":
    main()
