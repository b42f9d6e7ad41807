"""Small requests for a worker, and what became of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

from januslens_server.errors import CancelCheck
from januslens_server.scheduling.job import Outlet, Ticket
from januslens_server.scheduling.worker import DeviceWorker

LIMIT = 10
Run = Callable[[CancelCheck], Iterator[int | None]]


def job(*items: int) -> Run:
    """A request that yields `items`, each as many bytes as it says."""

    def run(_check_cancelled: CancelCheck) -> Iterator[int]:
        yield from items

    return run


def gated(gate: threading.Event, *items: int) -> Run:
    """A request that waits for a gate before each of its items."""

    def run(_check_cancelled: CancelCheck) -> Iterator[int]:
        for item in items:
            assert gate.wait(5)
            yield item

    return run


def submitted(
    worker: DeviceWorker, run: Callable[[CancelCheck], Iterator[Any]], ticket: Ticket | None = None
) -> Outlet[Any]:
    outlet: Outlet[Any] = Outlet(LIMIT, lambda item: item)
    worker.submit(run, outlet, ticket or Ticket(None))
    return outlet


async def all_of(outlet: Outlet[Any]) -> list[Any]:
    async with asyncio.timeout(5):
        return [item async for item in outlet.items()]


async def idle(worker: DeviceWorker) -> bool:
    return await asyncio.to_thread(worker.wait_idle, 5)
