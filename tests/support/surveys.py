"""Surveys in a process of their own, which tests kill, and the rows that they have written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import januslens
from tests.support.tethered import tethered

# Small parts, so that a survey is killed before, while and after it writes one. The process prints
# a line when it begins, and the number of prompts that are done after each thousand.
PROGRAM = """
import json, sys
import januslens
from januslens.surveys import runner

_, address, prompts, out, options, part, *replicas = sys.argv
runner.PART_PROMPTS = int(part)

def show(progress):
    if progress.done % 1000 == 0:
        print(progress.done, flush=True)

with januslens.Client(address) as client:
    print("begins", flush=True)
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
    """Run a survey in another process; at the end, wait for it."""
    values = (address, str(prompts), str(out), json.dumps(options), str(part_prompts), *replicas)
    process = subprocess.Popen(
        tethered([sys.executable, "-c", PROGRAM, *values]), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        yield process
    finally:
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def contents(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every table, by prompt; rows of one prompt keep their order."""
    survey = januslens.Survey.open(folder)
    return {
        table: sorted(
            survey.dataset(table).to_table().to_pylist(), key=lambda row: int(row["prompt"])
        )
        for table in survey.tables
    }
