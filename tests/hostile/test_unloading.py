"""A model is unloaded, and its memory is free, while peers attack it; other models are served."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import yaml

import januslens
from januslens.v1 import models_pb2
from januslens_server.access.callers import new_token, token_hash
from januslens_server.models.registry import RELEASE_SECONDS
from tests.hostile.raw_peer import RawPeer
from tests.hostile.test_connections import METHOD, send_most
from tests.support.calls import SERVICE, long_trace, started
from tests.support.members import PROC, members
from tests.support.memory import PAGE
from tests.support.model_folders import healthy
from tests.support.server import ServerProcess, running_server

STALL_SECONDS = 2
# Time for the streams that are not read to be aborted, for the model's memory to be released, and
# for both to be delayed by other programs on the machine.
UNLOAD_SECONDS = STALL_SECONDS + RELEASE_SECONDS + 10
READERS, HALF_SENT, FLOOD = 6, 2, 20
# Memory of each process that may remain after an attack: what the allocator keeps.
REMAINING = 60 * 2**20
OPERATOR, STRANGER = new_token(), new_token()


@dataclass
class Target:
    """A server with the demo, and the folder of another model that it may load."""

    server: ServerProcess
    folder: Path

    def client(self) -> januslens.Client:
        return januslens.Client(self.server.address, token=OPERATOR, timeout=60)

    def load(self, client: januslens.Client) -> None:
        client.load_model("victim", str(self.folder))
        deadline = time.monotonic() + 60
        while not client.model("victim").ready:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def resident(self) -> int:
        """Return the largest resident memory of a process that serves."""
        processes = members(self.server) or [self.server.process.pid]
        pages = [int((PROC / str(i) / "statm").read_text().split()[1]) for i in processes]
        return PAGE * max(pages)


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def target(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("unloading")
    healthy(folder / "victim")
    callers = folder / "callers.yaml"
    entries = [
        {"name": name, "tokens": [{"sha256": token_hash(token).hex()}], "admin": name == "operator"}
        for name, token in (("operator", OPERATOR), ("stranger", STRANGER))
    ]
    callers.write_text(yaml.safe_dump({"callers": entries}))
    flags = ["--callers", str(callers), "--loadable", str(folder)]
    flags += ["--stall-seconds", str(STALL_SECONDS), "--processes", str(request.param)]
    with running_server(*flags) as server:
        yield Target(server, folder / "victim")
    assert "Traceback" not in server.log


@contextmanager
def attacked(target: Target) -> Iterator[None]:
    """Attack the model: streams that are not read, half-sent requests, and a flood of calls."""
    request = long_trace(8)
    request.model = "victim"
    stop = threading.Event()
    flood = threading.Thread(target=call_until, args=(target, stop))
    with ExitStack() as stack:
        for _ in range(READERS):
            peer = stack.enter_context(RawPeer(target.server.address, window=0))
            peer.call(SERVICE + "Trace", request, STRANGER)
        for _ in range(HALF_SENT):
            peer = stack.enter_context(RawPeer(target.server.address, reads=False))
            send_most(peer, peer.headers(METHOD, token=STRANGER))
        flood.start()
        try:
            yield
        finally:
            stop.set()
            flood.join()


def call_until(target: Target, stop: threading.Event) -> None:
    """Keep calls of the model open, each time on a new connection."""
    request = models_pb2.TokenizeRequest(model="victim", text="The capital of Japan")
    metadata = (("authorization", f"Bearer {STRANGER}"),)
    while not stop.is_set():
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(target.server.address, options) as channel:
            calls = [
                started(channel, "Tokenize", request, metadata=metadata, timeout=30)
                for _ in range(FLOOD)
            ]
            for call in calls:
                call.exception()  # waits for the end
        time.sleep(0.05)


def test_a_model_is_unloaded_during_an_attack_and_another_is_served(target: Target) -> None:
    with target.client() as client:
        target.load(client)
        client.unload_model("victim")  # memory that is allocated once, by the first load
        before = target.resident()
        target.load(client)
        with attacked(target), ThreadPoolExecutor(1) as pool:
            began = time.monotonic()
            unloading = pool.submit(client.unload_model, "victim")
            while not wait([unloading], 0.2).done:
                assert client.trace("Japan", model="demo", layers=[0]).layers
            unloading.result()
            assert time.monotonic() - began < UNLOAD_SECONDS
            # The readers are still connected.
            assert target.resident() - before < REMAINING
        with pytest.raises(januslens.errors.ModelNotFound):
            client.tokenize("Japan", model="victim")
    assert "its memory is still in use" not in target.server.log
