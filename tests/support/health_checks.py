"""Check the health of a server under attack, and of a plain health server at the same moments.

The plain server is a process of its own that serves nothing else. Its latency shows what the
attackers take from the cores that all processes share. This module imports little, because the
processes that it starts import it too.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc


@dataclass
class Checks:
    """Seconds of the health checks of the server, and of a plain one beside it."""

    own: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        return f"health {figures(self.own)}, a plain server {figures(self.plain)}"


def figures(taken: list[float]) -> str:
    last = statistics.quantiles(taken, n=100, method="inclusive")[-1]
    shown = (1e3 * statistics.median(taken), 1e3 * last, 1e3 * max(taken))
    return "{:.1f} / {:.0f} / {:.0f} ms".format(*shown) + f" of {len(taken)}"


def serve_plain_health(address: Queue[str]) -> None:
    """Serve health checks and nothing else; runs in a separate process."""

    async def serve() -> None:
        server = grpc.aio.server()
        health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        address.put(f"127.0.0.1:{port}")
        await server.wait_for_termination()

    asyncio.run(serve())


def check_health(
    own: str, plain: str, ready: Event, stop: Event, found: Queue[list[list[float]]]
) -> None:
    """Record the seconds of every health check until `stop`; runs in a separate process."""
    taken: list[list[float]] = [[], []]
    with grpc.insecure_channel(own) as one, grpc.insecure_channel(plain) as other:
        checks: list[Any] = [c.unary_unary("/grpc.health.v1.Health/Check") for c in (one, other)]
        while not stop.is_set():
            for check, seconds in zip(checks, taken, strict=True):
                began = time.monotonic()
                assert check(b"", timeout=30) == b"\x08\x01"
                seconds.append(time.monotonic() - began)
            if len(taken[0]) == 10:
                ready.set()
            time.sleep(0.01)
    found.put(taken)


@contextmanager
def health_checked(address: str) -> Iterator[Checks]:
    """Check health while the block runs; afterwards the result has the seconds."""
    context, checks = multiprocessing.get_context("spawn"), Checks()
    ready, stop, found, plain = context.Event(), context.Event(), context.Queue(), context.Queue()
    serving = context.Process(target=serve_plain_health, args=(plain,), daemon=True)
    serving.start()
    arguments = (address, plain.get(timeout=60), ready, stop, found)
    checking = context.Process(target=check_health, args=arguments, daemon=True)
    checking.start()
    try:
        assert ready.wait(60)
        yield checks
    finally:
        stop.set()
        checks.own, checks.plain = (taken[10:] for taken in found.get(timeout=60))
        checking.join()
        serving.kill()
        serving.join()
