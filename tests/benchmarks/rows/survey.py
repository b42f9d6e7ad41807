"""Survey several prompts, compared with the engine fed with the same prompts in a loop."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import januslens
from januslens.results.exports import require
from januslens_server.specs import TraceSpec
from tests.benchmarks.bench import Bench
from tests.benchmarks.engine import run_trace
from tests.benchmarks.report import Row
from tests.benchmarks.timing import interleaved

PROMPTS = 4


def measure(bench: Bench) -> Iterator[Row]:
    """Time until all results are on the disk, compared with the engine and with a client's loop."""
    rows = require("januslens.surveys.tables", "analysis", "a survey").trace_rows
    ids = bench.shape.tokens(bench.shape.prompt)
    prompts = [ids[i:] + ids[:i] for i in range(PROMPTS)]
    taken = interleaved(
        {
            "engine": lambda: _engine(bench, prompts),
            "client": lambda: [bench.client.trace(prompt) for prompt in prompts],
            "survey": lambda: _survey(bench.client, prompts),
        },
        bench.rounds,
    )
    trace = bench.client.trace(prompts[0])
    started = time.process_time()
    rows(0, trace)
    taken["rows"] = (time.process_time() - started) * PROMPTS
    floor = f"the engine in one process, {taken['engine']:.3f} s"
    yield Row(
        f"Survey: {PROMPTS} traces until they are on the disk, beyond the engine in a loop",
        taken["survey"] / taken["engine"] - 1,
        "of it",
        0.10,
        f"{floor}; rows {taken['rows']:.3f} s of one core",
        taken,
    )
    yield Row(
        "the same by client.trace in a loop, nothing written",
        taken["client"] / taken["engine"] - 1,
        "of it",
        None,
        floor,
        taken,
    )


def _engine(bench: Bench, prompts: Sequence[tuple[int, ...]]) -> None:
    for prompt in prompts:
        run_trace(bench.model, TraceSpec(prompt, include_logit_contribution=True))


def _survey(client: januslens.Client, prompts: Sequence[tuple[int, ...]]) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        client.survey(prompts, folder)
    finally:
        shutil.rmtree(folder)
