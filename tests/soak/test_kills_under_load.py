"""Three servers, one killed every few seconds under load: no request is lost.

Callers resume. Their results are compared byte by byte with those of a server that is not killed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from januslens import Client
from tests.client.test_resuming import parts
from tests.support.proxies import haproxy, nginx, running_proxy
from tests.support.replicas import Replicas, free_ports, running_replicas

pytestmark = pytest.mark.soak

SECONDS = 60.0
BETWEEN_KILLS = 4.0
# On a slow machine servers restart slowly, so fewer can be killed in a minute.
KILLS, AT_MOST = 8, 180.0
CALLERS = 3

PROMPT = "The capital of Japan is the city of"
IDS = list(range(300, 332))

Answer = tuple[str, Any]
Ask = Callable[[Client], Answer]


def short_trace(client: Client) -> Answer:
    return "trace", streamed(client.stream_trace(PROMPT, layers=[0, 2, 3]))


def long_trace(client: Client) -> Answer:
    stream = client.stream_trace(IDS, positions=range(-6, 0), overlap_k=100, vectors=True)
    return "long trace", streamed(stream)


def gradient(client: Client) -> Answer:
    stream = client.stream_gradient_lens(
        IDS, [5], components=0, factors=True, top_k=200, matrices=["q", "v", "ff1", "ff2"]
    )
    return "gradient", streamed(stream)


def tokens(client: Client) -> Answer:
    return "tokens", client.tokenize(PROMPT)


def vectors(client: Client) -> Answer:
    reads = client.project([[1.0] * 128, [0.5] * 128])
    return "vectors", [read.top_tokens for read in reads]


KINDS: list[Ask] = [short_trace, long_trace, gradient, tokens, vectors]


class Cuts:
    """The number of interruptions and resumptions, and their request ids."""

    ids: list[str]

    def __init__(self) -> None:
        self.ids = []


CUTS = Cuts()


def streamed(stream: Any) -> list[bytes]:
    with stream:
        result = stream.result()
    CUTS.ids += [cut.request_id for cut in stream.interruptions]
    return parts(result.responses)


@pytest.fixture
def replicas() -> Iterator[Replicas]:
    CUTS.ids = []
    with running_replicas(3) as three:
        yield three


@pytest.mark.parametrize("way", ["round_robin", "nginx", "haproxy"])
def test_no_request_is_lost_and_every_interruption_is_reported(
    replicas: Replicas, way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as stack:
        address = replicas.address
        if way != "round_robin":
            (port,) = free_ports(1)
            make = {"nginx": nginx, "haproxy": haproxy}[way]
            stack.enter_context(running_proxy(make(replicas.ports, port, tmp_path), port))
            address = f"127.0.0.1:{port}"
        with Client(replicas.address, timeout=60) as client:
            expected = dict(ask(client) for ask in KINDS)
        stack.enter_context(caplog.at_level(logging.WARNING, logger="januslens"))
        served, lost, kills = loaded(replicas, address, expected)
    figures = f"{sum(served.values())} answers {dict(served)}, {kills} kills, {len(CUTS.ids)} cuts"
    print(f"\n{way}: {figures}")
    assert lost == []
    assert kills >= KILLS
    assert len(CUTS.ids) > 0, "no stream was cut: this run says little"
    named = [record.getMessage() for record in caplog.records]
    assert all(any(cut in line for line in named) for cut in CUTS.ids)
    assert set(served) == set(expected)


def loaded(
    replicas: Replicas, address: str, expected: dict[str, Any]
) -> tuple[Counter[str], list[object], int]:
    """Send requests without pause while the servers are killed and replaced one after the other."""
    stop = threading.Event()
    served: Counter[str] = Counter()
    lost: list[object] = []

    def ask(number: int) -> None:
        with Client(address, resume=True, timeout=120) as client:
            turn = number
            while not stop.is_set():
                try:
                    kind, answer = KINDS[turn % len(KINDS)](client)
                except Exception as error:  # noqa: BLE001 - whatever it is, a request was lost
                    lost.append(error)
                    continue
                if answer == expected[kind]:
                    served[kind] += 1
                else:
                    lost.append(f"another answer: {kind}")
                turn += 1

    callers = [threading.Thread(target=ask, args=(i,)) for i in range(CALLERS)]
    for caller in callers:
        caller.start()
    kills = 0
    try:
        began = time.monotonic()
        while time.monotonic() < began + (SECONDS if kills >= KILLS else AT_MOST):
            time.sleep(BETWEEN_KILLS)
            ready = [i for i, server in enumerate(replicas.servers) if " ready" in server.log]
            if len(ready) > 1:  # else those that were killed are not back yet
                replicas.kill(ready[kills % len(ready)])
                replicas.start(ready[kills % len(ready)])
                kills += 1
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    return served, lost, kills
