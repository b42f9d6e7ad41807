"""Ten thousand requests of every RPC: memory stops growing, and results stay equal.

Two processes serve them with mutual TLS. Meanwhile a third of the requests is cancelled, one
process is killed and replaced three times, and the certificate is replaced every 250 requests.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from cryptography import x509

from januslens.v1 import (
    activations_pb2,
    common_pb2,
    cost_pb2,
    edits_pb2,
    generation_pb2,
    gradient_lens_pb2,
    intervene_pb2,
    interventions_pb2,
    lens_pb2,
    models_pb2,
    neurons_pb2,
    server_pb2,
    service_pb2_grpc,
    sites_pb2,
    trace_pb2,
)
from tests.support.calls import methods, prompt, timeless
from tests.support.certificates import ServerFiles, replace_certificate, server_files, showing
from tests.support.members import members
from tests.support.memory import open_files, resident_bytes
from tests.support.metrics import sample, wait_until_idle
from tests.support.server import ServerProcess, running_server

REQUESTS = 10_000
CANCELLED = 0.3
AT_ONCE = 8
PER_CONNECTION = 25
KILLED_AFTER = (1_000, 2_000, 3_000)
CERTIFICATE_EVERY = 250
MAY_GROW = 10 * 2**20

JAPAN = prompt("The capital of Japan")
PARIS = common_pb2.Target(text=" Paris")
TRACE = trace_pb2.TraceRequest(input=JAPAN, node_kinds=[trace_pb2.NODE_KIND_BLOCK_OUTPUT])
# A sweep over the layers that replaces the output of a block by that of another prompt.
SWEEP = intervene_pb2.Sweep(
    template=interventions_pb2.Intervention(
        site=sites_pb2.SITE_BLOCK_OUTPUT,
        patch=interventions_pb2.Patch(input=prompt("The capital of Peru")),
    ),
    by_layer=True,
)
MIXED: list[tuple[str, Any]] = [
    ("GetServerInfo", server_pb2.GetServerInfoRequest()),
    ("ListModels", models_pb2.ListModelsRequest()),
    ("GetModel", models_pb2.GetModelRequest(model="demo")),
    ("Tokenize", models_pb2.TokenizeRequest(text="The capital of Japan")),
    (
        "Project",
        lens_pb2.ProjectRequest(
            vectors=common_pb2.Tensor(
                data_type=common_pb2.DATA_TYPE_FLOAT32, shape=[128], data=b"\x00\x00\x80?" * 128
            )
        ),
    ),
    ("Trace", trace_pb2.TraceRequest(input=prompt("Japan"), layers=[3])),
    ("Trace", TRACE),
    (
        "GradientLens",
        gradient_lens_pb2.GradientLensRequest(
            input=JAPAN,
            nll=gradient_lens_pb2.NegativeLogLikelihood(target=PARIS),
            layers=[1],
        ),
    ),
    ("Generate", generation_pb2.GenerateRequest(input=JAPAN, max_new_tokens=3)),
    (
        "PreviewEdit",
        edits_pb2.PreviewEditRequest(
            input=JAPAN, target=PARIS, shift=edits_pb2.ForwardShift(layer=1, eta=0.1)
        ),
    ),
    (
        "Activations",
        activations_pb2.ActivationsRequest(input=JAPAN, sites=[sites_pb2.SITE_BLOCK_OUTPUT]),
    ),
    ("Intervene", intervene_pb2.InterveneRequest(input=JAPAN, target=PARIS, sweep=SWEEP)),
    ("FindNeurons", neurons_pb2.FindNeuronsRequest(token=PARIS, page_size=5)),
    ("EstimateCost", cost_pb2.EstimateCostRequest(trace=TRACE)),
]


class Soak:
    """A server of two processes with mutual TLS, and what became of the requests so far."""

    def __init__(self, server: ServerProcess, files: ServerFiles, authority: trustme.CA) -> None:
        """Take a server that has served no request yet."""
        self.server, self.files, self.authority = server, files, authority
        self.credentials = showing(authority, "ada", authority)
        self.outcomes = Counter[str]()
        self.serials = set[int]()

    @asynccontextmanager
    async def stub(self) -> Any:
        """Open a connection of its own, which either process may accept."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        address = self.server.address
        async with grpc.aio.secure_channel(address, self.credentials, options) as channel:
            yield service_pb2_grpc.IntrospectionServiceStub(channel)

    async def answered(self, stub: Any, method: str, request: Any) -> list[bytes]:
        """Return the messages of a call; ask again if its process was killed."""
        while True:
            call = getattr(stub, method)(request, timeout=60, wait_for_ready=True)
            try:
                if methods()[method].server_streaming:
                    return [comparable(message) async for message in call]
                return [comparable(await call)]
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                self.outcomes["sent again"] += 1

    async def given_up(self, stub: Any, method: str, request: Any, after: float) -> None:
        """Cancel a request while it waits, computes or is written; some have finished before."""
        call = getattr(stub, method)(request, timeout=60, wait_for_ready=True)
        await asyncio.sleep(after)
        call.cancel()
        code = await call.code()
        if code is grpc.StatusCode.UNAVAILABLE:
            self.outcomes["sent again"] += 1
        else:
            assert code in {grpc.StatusCode.CANCELLED, grpc.StatusCode.OK}

    async def asked(self, count: int, seed: int, expected: list[list[bytes]]) -> None:
        """Send requests, some at once, over connections that are replaced."""
        draws, connections = random.Random(seed), iter(range(count // PER_CONNECTION))

        async def one_after_the_other() -> None:
            for _ in connections:
                async with self.stub() as stub:
                    for _ in range(PER_CONNECTION):
                        await self.asked_once(stub, draws, expected)

        await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))

    async def asked_once(
        self, stub: Any, draws: random.Random, expected: list[list[bytes]]
    ) -> None:
        which = draws.randrange(len(MIXED))
        if draws.random() < CANCELLED:
            await self.given_up(stub, *MIXED[which], draws.uniform(0, 0.05))
            self.outcomes["cancelled"] += 1
        else:
            assert await self.answered(stub, *MIXED[which]) == expected[which], MIXED[which]
            self.outcomes[MIXED[which][0]] += 1

    @property
    def finished(self) -> int:
        return self.outcomes.total() - self.outcomes["sent again"]

    def has_finished(self, count: int) -> bool:
        return self.finished >= count

    def has_replaced(self, processes: int) -> bool:
        return self.server.log.count(" serves again") >= processes

    async def kill(self) -> None:
        """Kill the younger process after some requests; the older one serves until the end."""
        for number, count in enumerate(KILLED_AFTER, 1):
            await until(partial(self.has_finished, count))
            os.kill(members(self.server)[-1], signal.SIGKILL)
            await until(partial(self.has_replaced, number))

    async def replace_certificates(self) -> None:
        """Replace the certificate again and again, and check that new connections show it."""
        for count in range(CERTIFICATE_EVERY, REQUESTS, CERTIFICATE_EVERY):
            await until(partial(self.has_finished, count))
            replace_certificate(self.files, self.authority)
            shown = await asyncio.to_thread(shown_serial, self.server.address)
            pem = self.files.certificate.read_bytes()
            assert shown == x509.load_pem_x509_certificate(pem).serial_number
            self.serials.add(shown)


async def until(reached: Callable[[], bool]) -> None:
    while not reached():  # noqa: ASYNC110 - a line in the server's log sets no event
        await asyncio.sleep(0.05)


def comparable(message: Any) -> bytes:
    """Return a message's bytes without times and ids, and without the estimate that adapts."""
    if isinstance(message, cost_pb2.EstimateCostResponse):
        message.ClearField("seconds")
    return timeless(message)


def shown_serial(address: str) -> int:
    """Return the serial number of the server's certificate on a new connection."""
    host, _, port = address.rpartition(":")
    while True:
        try:
            pem = ssl.get_server_certificate((host, int(port)), timeout=20)
        except ConnectionError:  # this process was killed; the other one accepts
            continue
        return x509.load_pem_x509_certificate(pem.encode()).serial_number


@pytest.fixture
def soak(tmp_path: Path) -> Iterator[Soak]:
    authority = trustme.CA()
    files = server_files(authority, tmp_path)
    with running_server("--processes", "2", *files.mutual_flags) as server:
        yield Soak(server, files, authority)


async def test_memory_stops_growing_and_results_stay_equal(soak: Soak) -> None:
    assert {method for method, _ in MIXED} == set(methods())
    async with soak.stub() as stub:
        expected = [await soak.answered(stub, method, request) for method, request in MIXED]
    disturbances = asyncio.gather(soak.kill(), soak.replace_certificates())
    held = []
    for half in range(2):
        await soak.asked(REQUESTS // 2, half, expected)
        wait_until_idle(soak.server)
        held.append([resident_bytes(process) for process in members(soak.server)])
        sizes = " and ".join(f"{size / 2**20:.1f}" for size in held[-1])
        print(f"{soak.finished} requests: {sizes} MiB; {len(soak.serials)} certificates")
    await disturbances
    print(dict(soak.outcomes))
    for before, after in zip(*held, strict=True):
        assert after - before <= MAY_GROW
    # Killing a process ends the requests that it has, at most one of each connection.
    assert soak.outcomes["sent again"] <= len(KILLED_AFTER) * AT_ONCE
    assert max(open_files(process) for process in members(soak.server)) < 100
    for gauge in ("januslens_queue_depth", "januslens_in_flight"):
        assert sample(soak.server, gauge) == 0
    # No process has ended by itself.
    assert re.findall(r"ended with status (\d+)", soak.server.log) == ["137"] * len(KILLED_AFTER)
    assert "Traceback" not in soak.server.log
