"""What requests cost and how long they wait: `python -m tests.benchmarks.capacity [demo] [gpt2]`.

First each kind of request alone: seconds of the device by stage, messages and bytes, from the
server's own metrics. Then a Poisson load at several utilisations, and beside the measured mean wait
what the queue of docs/scaling.md predicts for it.
"""

from __future__ import annotations

import asyncio
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import grpc
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GPT2Config

from januslens.v1 import common_pb2, gradient_lens_pb2, service_pb2_grpc, trace_pb2
from januslens_server.demo import model_path
from tests.support.calls import methods, prompt, started
from tests.support.metrics import page, wait_until_idle
from tests.support.server import ServerProcess, running_server

Samples = Mapping[str, float]

SENTENCE = "The capital of Japan is the city of Tokyo and"
REPEATS = {"demo": 10, "gpt2": 1}
# Not above: the client computes on the same cores.
UTILISATIONS = (0.2, 0.4, 0.6)
LOAD_SECONDS = 12.0
LOADING_SECONDS = 180.0
SEED = 1


def gpt2_sized(folder: Path) -> Path:
    """A model of GPT-2 small's shape, with the demo's tokenizer and random weights."""
    AutoModelForCausalLM.from_config(GPT2Config()).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path() / name, folder)
    return folder


def requests(model: str) -> dict[str, tuple[str, Message]]:
    """Kinds of requests by what they are called here."""
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
    """The sums over all labels, and of the stages each by itself."""
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
    """How the server's counters grew over some requests."""

    before: Samples
    after: Samples
    requests: int

    def each(self, name: str) -> float:
        """By one request."""
        return (self.after[name] - self.before.get(name, 0.0)) / self.requests

    def stages(self) -> str:
        """Milliseconds of every stage of one request."""
        prefix = "januslens_stage_seconds_sum "
        spent = {n.removeprefix(prefix): self.each(n) for n in self.after if n.startswith(prefix)}
        return ", ".join(f"{name} {1e3 * s:.1f}" for name, s in spent.items() if s > 5e-5)


def grown(server: ServerProcess, count: int, run: Callable[[], object]) -> Growth:
    """Run something that makes `count` requests."""
    wait_until_idle(server)
    before = samples(server)
    run()
    wait_until_idle(server)
    return Growth(before, samples(server), count)


def repeat(channel: grpc.Channel, method: str, request: Message, times: int) -> None:
    """One request after the other, each read to its end."""
    for _ in range(times):
        call = started(channel, method, request)
        list(call) if methods()[method].server_streaming else call.result()


async def poisson(
    address: str, request: trace_pb2.TraceRequest, rate: float, seconds: float
) -> list[Served]:
    """Traces that come by chance, `rate` a second on average; gives them in their order."""
    chance = random.Random(SEED)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = service_pb2_grpc.IntrospectionServiceStub(channel)
        running = []
        due, end = time.monotonic(), time.monotonic() + seconds
        while (due := due + chance.expovariate(rate)) < end:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            running.append(asyncio.ensure_future(_served(stub, request)))
        return await asyncio.gather(*running)


@dataclass(frozen=True)
class Served:
    """When a request was sent, and the seconds of the device that its summary gives."""

    sent: float
    seconds: float


async def _served(
    stub: service_pb2_grpc.IntrospectionServiceAsyncStub, request: trace_pb2.TraceRequest
) -> Served:
    sent, seconds = time.monotonic(), 0.0
    async for message in stub.Trace(request):
        seconds = sum(stage.seconds for stage in message.summary.times)
    return Served(sent, seconds)


def predicted_wait(served: Sequence[Served], seconds: float) -> tuple[float, float]:
    """Utilisation and mean wait by Pollaczek and Khinchine, from the requests' own times."""
    rate = len(served) / seconds
    busy = sum(one.seconds for one in served) / seconds
    squares = fmean(one.seconds**2 for one in served)
    return busy, rate * squares / (2 * (1 - busy)) if busy < 1 else math.inf


def replayed_wait(served: Sequence[Served]) -> float:
    """The mean wait if one after the other is served as they came (Lindley's recursion).

    Unlike the formula's it holds for these very arrivals, however far they are from chance.
    """
    free, waits = 0.0, []
    for one in served:
        waits.append(max(0.0, free - one.sent))
        free = max(free, one.sent) + one.seconds
    return fmean(waits)


def costs(server: ServerProcess, model: str, console: Console) -> None:
    """Each kind of request alone."""
    table = Table("request", "device ms", "by stage, ms", "messages", "KiB", "tokens", title=model)
    with grpc.insecure_channel(server.address) as channel:
        for name, (method, request) in requests(model).items():
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


def waits(server: ServerProcess, console: Console) -> None:
    """The mean wait of equal requests under load, and the formula's."""
    request = trace_pb2.TraceRequest(input=prompt(SENTENCE))
    with grpc.insecure_channel(server.address) as channel:
        alone = grown(server, 30, partial(repeat, channel, "Trace", request, 30))
    service = alone.each("januslens_busy_seconds_total")
    table = Table(
        "asked for", "device busy", "requests/s", "mean wait, ms", "replayed, ms", "formula, ms"
    )
    for asked in UTILISATIONS:
        wait_until_idle(server)
        before, began = samples(server), time.monotonic()
        served = asyncio.run(poisson(server.address, request, asked / service, LOAD_SECONDS))
        seconds = time.monotonic() - began
        growth = Growth(before, samples(server), len(served))
        busy, predicted = predicted_wait(served, seconds)
        table.add_row(
            f"{asked:.0%}",
            f"{busy:.0%}",
            f"{len(served) / seconds:.1f}",
            f"{1e3 * growth.each('januslens_queue_seconds_sum'):.1f}",
            f"{1e3 * replayed_wait(served):.1f}",
            f"{1e3 * predicted:.1f}",
        )
    console.print(table)


def wait_until_loaded(server: ServerProcess) -> None:
    """A model of GPT-2's size takes longer on a CPU than tests wait."""
    deadline = time.monotonic() + LOADING_SECONDS
    while "INFO januslens_server: ready" not in server.log:
        if server.process.poll() is not None or time.monotonic() > deadline:
            raise TimeoutError(server.log)
        time.sleep(0.1)


def main() -> None:
    """Both tables for every model that was named."""
    console = Console(width=160)
    with tempfile.TemporaryDirectory() as folder:
        for model in sys.argv[1:] or REPEATS:
            path = model_path() if model == "demo" else gpt2_sized(Path(folder))
            with running_server("--model", f"{model}={path}", until="metrics on") as server:
                wait_until_loaded(server)
                resident = samples(server)["process_resident_memory_bytes"]
                console.print(f"{model}: resident {resident / 2**30:.2f} GiB")
                costs(server, model, console)
                if model == "demo":
                    waits(server, console)


if __name__ == "__main__":
    main()
