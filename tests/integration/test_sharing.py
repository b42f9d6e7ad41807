"""Two callers share a device fairly."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import yaml
from google.protobuf.message import Message
from transformers import GPT2Config, GPT2LMHeadModel

from januslens.v1 import common_pb2, generation_pb2, neurons_pb2, trace_pb2
from januslens_server.access.callers import new_token, token_hash
from januslens_server.demo import model_path
from tests.reference.examples import TOKENIZER
from tests.support.calls import prompt, started, timeless, token_ids
from tests.support.metrics import sample, unfinished, wait_until_idle
from tests.support.server import ServerProcess, running_server

SHORT = trace_pb2.TraceRequest(model="demo", input=prompt("The capital of Japan is"))
LONG = trace_pb2.TraceRequest(
    model="demo", input=token_ids(*range(300, 340)), all_positions=True, overlap_k=5
)
MIDDLE = trace_pb2.TraceRequest(model="demo", input=token_ids(*range(300, 308)), all_positions=True)
COLD = neurons_pb2.FindNeuronsRequest(
    model="wide", token=common_pb2.Target(token_ids=common_pb2.TokenIds(ids=[7]))
)


@dataclass
class Shared:
    """A server with two models, and the tokens of two callers."""

    server: ServerProcess
    channel: grpc.Channel
    tokens: dict[str, str]

    def started(self, caller: str, method: str, request: Message) -> Any:
        metadata = (("authorization", f"Bearer {self.tokens[caller]}"),)
        return started(self.channel, method, request, metadata=metadata, timeout=60)

    def traced(self, caller: str, request: trace_pb2.TraceRequest) -> list[Message]:
        return list(self.started(caller, "Trace", request))


def wide_model(folder: Path) -> Path:
    """Few layers and many tokens: indexing its 8,192 neurons takes some seconds."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20_000,
        n_positions=16,
        n_embd=16,
        n_layer=4,
        n_head=2,
        n_inner=2048,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("sharing")
    tokens = {name: new_token() for name in ("many", "few")}
    callers = [
        {"name": name, "tokens": [{"sha256": token_hash(token).hex()}]}
        for name, token in tokens.items()
    ]
    (folder / "callers.yaml").write_text(yaml.safe_dump({"callers": callers}))
    models = {"demo": model_path(), "wide": wide_model(folder / "wide")}
    flags = [f"--model={name}={path}" for name, path in models.items()]
    flags += [f"--callers={folder / 'callers.yaml'}", "--log-format=json"]
    with (
        running_server(*flags) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        yield Shared(server, channel, tokens)


@dataclass
class Reader:
    """Reads a stream in a thread."""

    call: Any
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        with suppress(grpc.RpcError):  # a test may cancel it
            for message in self.call:
                self.messages.append(message)


def test_a_short_trace_does_not_wait_for_another_callers_long_trace(shared: Shared) -> None:
    short, long = shared.traced("few", SHORT), shared.traced("many", LONG)
    reader = Reader(shared.started("many", "Trace", LONG))
    while not reader.messages:
        time.sleep(0.01)
    for _ in range(3):
        found = shared.traced("few", SHORT)
        assert [*map(timeless, found)] == [*map(timeless, short)]
    assert len(reader.messages) < len(long) / 2
    reader.thread.join()
    assert [*map(timeless, reader.messages)] == [*map(timeless, long)]
    wait_until_idle(shared.server)


def test_a_short_trace_does_not_wait_for_another_callers_neuron_index(shared: Shared) -> None:
    cold = shared.started("many", "FindNeurons", COLD)
    while not unfinished(shared.server):
        time.sleep(0.01)
    for _ in range(3):
        assert shared.traced("few", SHORT)
    assert not cold.done()
    found = cold.result()
    assert found.neurons
    again = shared.started("few", "FindNeurons", COLD).result()
    assert again.neurons == found.neurons


def test_a_trace_is_not_late_beside_another_callers_generations(shared: Shared) -> None:
    calls = [
        shared.started(
            "many",
            "Generate",
            generation_pb2.GenerateRequest(
                model="demo",
                input=prompt("The capital of Japan is"),
                max_new_tokens=80,
                sampling=generation_pb2.Sampling(temperature=5.0, seed=seed),
                reading=generation_pb2.LayerReading(),
            ),
        )
        for seed in range(32)
    ]
    readers = [Reader(call) for call in calls]
    while not any(len(reader.messages) > 1 for reader in readers):
        time.sleep(0.01)
    assert shared.traced("few", SHORT)
    late = sum(reader.messages[-1].HasField("summary") for reader in readers if reader.messages)
    assert late < len(readers) / 2
    for call, reader in zip(calls, readers, strict=True):
        call.cancel()
        reader.thread.join()
    wait_until_idle(shared.server)


def test_callers_have_equal_shares_however_many_requests_they_send(shared: Shared) -> None:
    """One caller sends six requests at a time, the other two; each gets half of the device time."""
    wait_until_idle(shared.server)
    over = threading.Event()

    def busily(_: int) -> None:
        while not over.is_set():
            shared.traced("many", MIDDLE)

    with ThreadPoolExecutor(8) as callers:
        many = [callers.submit(busily, i) for i in range(6)]
        while unfinished(shared.server) < 6:
            time.sleep(0.01)
        before, lines = busy(shared.server), len(shared.server.lines)
        list(callers.map(lambda _: shared.traced("few", MIDDLE), range(6)))
        after = busy(shared.server)
        over.set()
        for each in many:
            each.result()
    wait_until_idle(shared.server)
    calls = [json.loads(line) for line in shared.server.lines[lines:]]
    had = [call["device_seconds"] for call in calls if call.get("caller") == "few"]
    assert len(had) == 6
    assert 0.4 <= sum(had) / (after - before) <= 0.6


def busy(server: ServerProcess) -> float:
    return sample(server, "januslens_busy_seconds_total")
