"""A survey that is killed twenty times, with its servers, and one of thousands of prompts."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

import januslens
from januslens.v1 import common_pb2, models_pb2
from tests.client.messages import trace_stream
from tests.client.scripted import Script, serving
from tests.support.replicas import running_replicas
from tests.support.surveys import contents, killed_after, prompts_file, running_survey

COUNTRIES = ("Japan", "Peru", "France", "Spain", "Italy", "Kenya", "Chile", "Cuba")
PROMPTS = [f"{i}. The capital of {COUNTRIES[i % 8]} is the city of" for i in range(400)]
OPTIONS: dict[str, Any] = {
    "attribution": True,
    "node_kinds": ["BLOCK_OUTPUT", "HEAD_OUTPUT", "MLP_VALUE"],
}
KILLS = 20
# SOAK_PROMPTS=100000 runs the longer survey, which takes about five times as long.
MANY = int(os.environ.get("SOAK_PROMPTS", "20000"))
MAY_GROW = 32 * 2**20


def test_twenty_kills_lose_nothing_and_write_nothing_twice(tmp_path: Path) -> None:
    file = prompts_file(tmp_path / "prompts.jsonl", PROMPTS)
    drawn = random.Random(18)
    with running_replicas(2) as replicas:
        first, second = (f"127.0.0.1:{port}" for port in replicas.ports)
        with januslens.Client(first) as client:
            client.survey(file, tmp_path / "whole", replicas=[second], **OPTIONS)
        unfinished = 0
        for kill in range(KILLS):
            with running_survey(first, file, tmp_path / "killed", OPTIONS, second) as process:
                if kill % 3 == 0:  # a server as well, which comes back
                    victim = drawn.randrange(2)
                    replicas.kill(victim)
                    replicas.start(victim)
                unfinished += killed_after(process, drawn.randrange(2, 16), drawn.uniform(0, 0.1))
            print(f"kill {kill + 1}: {written(tmp_path / 'killed')} of {len(PROMPTS)} are written")
        for server in replicas.servers:
            server.wait_for("ready")
        with januslens.Client(first) as client:
            survey = client.survey(file, tmp_path / "killed", replicas=[second], **OPTIONS)
    assert unfinished == KILLS
    assert survey.manifest["failures"] == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def written(folder: Path) -> int:
    """Return the number of prompts that are written."""
    return sum(pq.read_metadata(part).num_rows for part in folder.glob("prompts/*.parquet"))


@contextmanager
def scripted() -> Iterator[str]:
    """Serve a short trace, the same for every prompt, and the model that it names."""
    provenance = common_pb2.Provenance(model="m", revision="r")
    model = models_pb2.Model(name="m", state=models_pb2.Model.STATE_READY, provenance=provenance)
    pages = [models_pb2.ListModelsResponse(models=[model])]
    with serving(Script(responses=trace_stream(), pages=pages)) as address:
        yield address


def test_memory_does_not_grow_with_the_number_of_prompts(tmp_path: Path) -> None:
    file = prompts_file(tmp_path / "prompts.jsonl", [f"prompt {i}" for i in range(MANY)])
    held: dict[int, int] = {}
    with (
        scripted() as address,
        running_survey(address, file, tmp_path / "out", {}, part_prompts=256) as process,
    ):
        assert process.stdout is not None
        running = psutil.Process(process.pid)
        for line in process.stdout:
            done = int(line)
            if done % 1000 == 0:
                held[done] = running.memory_info().rss
            if done % 10_000 == 0:
                print(f"{done} prompts: {held[done] / 2**20:.1f} MiB", flush=True)
    assert process.returncode == 0
    assert max(held) == MANY
    assert max(held.values()) - held[MANY // 10] <= MAY_GROW
    survey = januslens.Survey.open(tmp_path / "out")
    assert survey.complete
    assert survey.dataset("prompts").count_rows() == MANY
