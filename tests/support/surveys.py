"""Surveys in a process of their own, which tests kill, and the rows that they have written."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

import januslens
from tests.support.tethered import tethered

# The process prints the number of prompts that are done after each of them.
PROGRAM = """
import json, sys
import januslens
from januslens.surveys import runner

_, address, prompts, out, options, part, *replicas = sys.argv
runner.PART_PROMPTS = int(part)

def show(progress):
    print(progress.done, flush=True)

with januslens.Client(address) as client:
    options = json.loads(options)
    client.survey(prompts, out, replicas=replicas, on_progress=show, **options)
"""


def prompts_file(path: Path, prompts: Sequence[str]) -> Path:
    """Write prompts as lines of JSON."""
    path.write_text("".join(f"{json.dumps(prompt)}\n" for prompt in prompts))
    return path


@contextmanager
def running_survey(
    address: str,
    prompts: Path,
    out: Path,
    options: dict[str, Any],
    *replicas: str,
    part_prompts: int = 5,
) -> Iterator[subprocess.Popen[str]]:
    """Run a survey in another process, with small parts; at the end, wait for it."""
    values = (address, str(prompts), str(out), json.dumps(options), str(part_prompts), *replicas)
    process = subprocess.Popen(
        tethered([sys.executable, "-c", PROGRAM, *values]), stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def killed_after(process: subprocess.Popen[str], results: int, seconds: float) -> bool:
    """Kill a survey some seconds after it has received some results; False if it ended before."""
    assert process.stdout is not None
    for _ in range(results):
        process.stdout.readline()
    time.sleep(seconds)
    running = process.poll() is None
    process.kill()
    return running


def contents(folder: Path) -> dict[str, pa.Table]:
    """Return the rows of every table, by prompt; rows of one prompt keep their order."""
    survey = januslens.Survey.open(folder)
    return {table: _by_prompt(survey.dataset(table).to_table()) for table in survey.tables}


def _by_prompt(rows: pa.Table) -> pa.Table:
    numbered = rows.append_column("row", pa.array(range(len(rows))))
    ordered = numbered.sort_by([("prompt", "ascending"), ("row", "ascending")])
    return ordered.drop_columns("row").combine_chunks()
