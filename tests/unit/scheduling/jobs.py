"""Small requests for a worker, and their results."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

from januslens_server.errors import CancelCheck
from januslens_server.scheduling.job import QueuedRequest, ResultBuffer
from januslens_server.scheduling.worker import DeviceWorker

LIMIT = 10
Run = Callable[[CancelCheck], Iterator[int | None]]


def job(*items: int) -> Run:
    """A request that yields `items`, each of which is its own size in bytes."""

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
    worker: DeviceWorker,
    run: Callable[[CancelCheck], Iterator[Any]],
    request: QueuedRequest | None = None,
) -> ResultBuffer[Any]:
    buffer: ResultBuffer[Any] = ResultBuffer(LIMIT, lambda item: item)
    worker.submit(run, buffer, request or QueuedRequest(None))
    return buffer


async def all_of(buffer: ResultBuffer[Any]) -> list[Any]:
    async with asyncio.timeout(5):
        return [item async for item in buffer.items()]


async def idle(worker: DeviceWorker) -> bool:
    """Wait until no request is unfinished; raises `TimeoutError` after 5 s."""
    async with asyncio.timeout(5):
        while worker.unfinished:  # noqa: ASYNC110 - its thread sets no asyncio event
            await asyncio.sleep(0.01)
    return True
