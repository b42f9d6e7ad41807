"""Fixtures of every benchmark row: a server, a client, and the same model in this process."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import januslens
from januslens_server.models.loader import ModelSource, load
from januslens_server.models.resident import ResidentModel
from tests.benchmarks.floors import Floors
from tests.benchmarks.memory import Memory
from tests.benchmarks.shapes import Shape, build
from tests.support.server import running_server

# Large models are read and checked before they are served.
LOADING_SECONDS = 900.0
COLD = ("--row-cache", "0")
DATA_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Bench:
    """One model, served over loopback by another process, and loaded in this one for its floors.

    Neither keeps anything between requests, so a repeated trace is as cold as the first. `flags`
    are those with which to start a similar server, without `COLD`. `server` measures the memory of
    the other process, at `address`; `rounds` is the number of alternating rounds.
    """

    shape: Shape
    model: ResidentModel
    floors: Floors
    client: januslens.Client
    server: Memory
    rounds: int
    flags: tuple[str, ...]
    address: str


@contextmanager
def bench(
    shape: Shape,
    folder: Path,
    rounds: int,
    threads: int,
    device: str = "cpu",
    data_type: str = "float32",
) -> Iterator[Bench]:
    """Create and load the model, and serve it with the same number of `threads` as this process."""
    torch.set_num_threads(threads)
    path = build(shape, folder, DATA_TYPES[data_type])
    where = ("--device", device, "--data-type", data_type)
    flags = ("--model", f"bench={path}", "--threads", str(threads), *where)
    source = ModelSource("bench", str(path), device=device, data_type=data_type, row_cache_bytes=0)
    model = load(source)
    with (
        running_server(*flags, *COLD, seconds=LOADING_SECONDS) as server,
        januslens.Client(server.address) as client,
    ):
        memory = Memory(server.process.pid)
        address = server.address
        yield Bench(shape, model, Floors(model), client, memory, rounds, flags, address)


def machine(threads: int) -> str:
    """Describe the machine and the library versions of a measurement."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{_processor()}, {threads} threads, torch {torch.__version__}"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
