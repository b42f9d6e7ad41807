"""Measure cost and waiting time of requests: `python -m tests.benchmarks.capacity [demo] [gpt2]`.

For each model, every kind of request is measured alone: device seconds by stage, messages and
bytes, from the server's own metrics. Then the scheduler runs under random load, and its mean
waiting time is compared with the prediction of the queueing model in docs/scaling.md. The requests
of this load sleep, so they do not take a core from the process that creates them.
"""

from __future__ import annotations

import asyncio
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import grpc
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GPT2Config

from januslens.v1 import common_pb2, gradient_lens_pb2, trace_pb2
from januslens_server.demo import model_path
from januslens_server.errors import CancelCheck
from januslens_server.scheduling.job import QueuedRequest, ResultBuffer
from januslens_server.scheduling.worker import DeviceWorker
from tests.support.calls import methods, prompt, started
from tests.support.metrics import page, wait_until_idle
from tests.support.server import ServerProcess, running_server

Samples = Mapping[str, float]

SENTENCE = "The capital of Japan is the city of Tokyo and"
REPEATS = {"demo": 10, "gpt2": 1}
SLOW = {("gpt2", "Trace, all positions")}  # minutes on a CPU
# Requests that sleep: their number, their duration, and the utilisation of the device.
REQUESTS = 1500
EQUAL, SHORT, LONG = 0.008, 0.005, 0.25
UTILISATIONS = (0.5, 0.7, 0.9)
LOADING_SECONDS = 180.0
SEED = 1


def gpt2_sized(folder: Path) -> Path:
    """Create a model with the shape of GPT-2 small, the demo's tokenizer and random weights."""
    AutoModelForCausalLM.from_config(GPT2Config()).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path() / name, folder)
    return folder


def requests(model: str) -> dict[str, tuple[str, Message]]:
    """Return the kinds of requests by name."""
    said, many = prompt(SENTENCE), prompt(" ".join([SENTENCE] * 4))
    loss = gradient_lens_pb2.NegativeLogLikelihood(target=common_pb2.Target(text=" Paris"))
    return {
        "Trace, 1 position": ("Trace", trace_pb2.TraceRequest(model=model, input=said)),
        "Trace, all positions": (
            "Trace",
            trace_pb2.TraceRequest(model=model, input=said, all_positions=True),
        ),
        "Trace, 4 times the prompt": ("Trace", trace_pb2.TraceRequest(model=model, input=many)),
        "GradientLens": (
            "GradientLens",
            gradient_lens_pb2.GradientLensRequest(model=model, input=said, nll=loss),
        ),
    }


def samples(server: ServerProcess) -> dict[str, float]:
    """Return the sums of the metrics over all labels, and those of each stage."""
    found: dict[str, float] = {}
    for family in page(server):
        for sample in family.samples:
            if "le" in sample.labels:
                continue
            stage = sample.labels.get("stage")
            name = sample.name if stage is None else f"{sample.name} {stage}"
            found[name] = found.get(name, 0.0) + sample.value
    return found


@dataclass(frozen=True)
class Growth:
    """The increase of the server's counters over some requests."""

    before: Samples
    after: Samples
    requests: int

    def each(self, name: str) -> float:
        """Return the increase per request."""
        return (self.after[name] - self.before.get(name, 0.0)) / self.requests

    def stages(self) -> str:
        """Return the milliseconds of every stage of one request."""
        prefix = "januslens_stage_seconds_sum "
        spent = {n.removeprefix(prefix): self.each(n) for n in self.after if n.startswith(prefix)}
        return ", ".join(f"{name} {1e3 * s:.1f}" for name, s in spent.items() if s > 5e-5)


def grown(server: ServerProcess, count: int, run: Callable[[], object]) -> Growth:
    """Run `count` requests and return the increase of the counters."""
    wait_until_idle(server)
    before = samples(server)
    run()
    wait_until_idle(server)
    return Growth(before, samples(server), count)


def repeat(channel: grpc.Channel, method: str, request: Message, times: int) -> None:
    """Send requests one after the other, and read each to its end."""
    for _ in range(times):
        call = started(channel, method, request)
        list(call) if methods()[method].server_streaming else call.result()


@dataclass(frozen=True)
class Served:
    """The arrival time, waiting time and device time of a request."""

    came: float
    waited: float
    seconds: float


async def served(seconds: Sequence[float], rate: float) -> list[Served]:
    """Send requests of these durations through the scheduler at random times, `rate` per second."""
    chance = random.Random(SEED)
    worker = DeviceWorker(max_waiting=len(seconds))
    running, due = [], time.monotonic()
    for length in seconds:
        due += chance.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        running.append(asyncio.ensure_future(_through(worker, length)))
    return await asyncio.gather(*running)


async def _through(worker: DeviceWorker, seconds: float) -> Served:
    def sleeping(_check_cancelled: CancelCheck) -> Iterator[None]:
        time.sleep(seconds)
        yield

    came, queued = time.monotonic(), QueuedRequest(None)
    buffer: ResultBuffer[None] = ResultBuffer(1, lambda _: 0)
    worker.submit(sleeping, buffer, queued)
    async for _ in buffer.items():
        pass
    return Served(came, queued.waited or 0.0, queued.spent)


def predicted_wait(found: Sequence[Served]) -> tuple[float, float]:
    """Return the utilisation and the mean wait, by Pollaczek and Khinchine, of measured times."""
    rate = len(found) / (found[-1].came - found[0].came)
    busy = rate * fmean(one.seconds for one in found)
    squares = fmean(one.seconds**2 for one in found)
    return busy, rate * squares / (2 * (1 - busy)) if busy < 1 else math.inf


def simulated_wait(found: Sequence[Served]) -> float:
    """Mean wait of these arrivals in a first-come, first-served queue (Lindley's recursion).

    Unlike the formula, it applies to this sequence of arrivals, even if it is short.
    """
    free, waits = 0.0, []
    for one in found:
        waits.append(max(0.0, free - one.came))
        free = max(free, one.came) + one.seconds
    return fmean(waits)


def costs(server: ServerProcess, model: str, console: Console) -> None:
    """Print the cost of each kind of request, measured alone."""
    table = Table("request", "device ms", "by stage, ms", "messages", "KiB", "tokens", title=model)
    with grpc.insecure_channel(server.address) as channel:
        for name, (method, request) in requests(model).items():
            if (model, name) in SLOW:
                continue
            growth = grown(
                server, REPEATS[model], partial(repeat, channel, method, request, REPEATS[model])
            )
            table.add_row(
                name,
                f"{1e3 * growth.each('januslens_busy_seconds_total'):.1f}",
                growth.stages(),
                f"{growth.each('grpc_server_msg_sent_total'):.0f}",
                f"{growth.each('januslens_stream_bytes_total') / 1024:.0f}",
                f"{growth.each('januslens_tokens_total'):.0f}",
            )
    console.print(table)


def waits(console: Console) -> None:
    """Print the mean waits of equal requests, and of a mixture with one long request in 100."""
    columns = ("requests", "device busy", "mean wait, ms", "simulated, ms", "formula, ms")
    table = Table(*columns)
    chance = random.Random(SEED)
    mixed = [LONG if chance.random() < 0.01 else SHORT for _ in range(REQUESTS)]
    for name, lengths in {"equal": [EQUAL] * REQUESTS, "mixed": mixed}.items():
        for utilisation in UTILISATIONS:
            found = asyncio.run(served(lengths, utilisation / fmean(lengths)))
            busy, predicted = predicted_wait(found)
            figures = (fmean(one.waited for one in found), simulated_wait(found), predicted)
            table.add_row(name, f"{busy:.0%}", *(f"{1e3 * figure:.1f}" for figure in figures))
    console.print(table)


def wait_until_loaded(server: ServerProcess) -> None:
    """Wait longer than tests do, because a model of GPT-2's size loads slowly on a CPU."""
    deadline = time.monotonic() + LOADING_SECONDS
    while "INFO januslens_server: ready" not in server.log:
        if server.process.poll() is not None or time.monotonic() > deadline:
            raise TimeoutError(server.log)
        time.sleep(0.1)


def main() -> None:
    """Print the costs of every named model, and the scheduler's waits."""
    console = Console(width=160)
    with tempfile.TemporaryDirectory() as folder:
        for model in sys.argv[1:] or REPEATS:
            path = model_path() if model == "demo" else gpt2_sized(Path(folder))
            with running_server("--model", f"{model}={path}", until="metrics on") as server:
                wait_until_loaded(server)
                resident = samples(server)["process_resident_memory_bytes"]
                console.print(f"{model}: resident {resident / 2**30:.2f} GiB")
                costs(server, model, console)
    waits(console)


if __name__ == "__main__":
    main()
