"""Exhausted memory is distinguished from bugs, and the next request works."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from januslens_server.errors import OutOfMemory
from januslens_server.models.failures import service_error
from januslens_server.scheduling.job import QueuedRequest, ResultBuffer
from januslens_server.scheduling.worker import DeviceWorker


def allocating(size: int) -> Callable[[Callable[[], None]], Iterator[int]]:
    def run(_check_cancelled: Callable[[], None]) -> Iterator[int]:
        yield torch.empty(size, dtype=torch.uint8).numel()

    return run


async def outcome(worker: DeviceWorker, size: int) -> list[int]:
    buffer: ResultBuffer[int] = ResultBuffer(100, lambda _size: 1)
    worker.submit(allocating(size), buffer, QueuedRequest(None))
    return [item async for item in buffer.items()]


async def test_out_of_memory_request_does_not_affect_others() -> None:
    worker = DeviceWorker(4, service_error)
    with pytest.raises(OutOfMemory, match="no memory left"):
        await outcome(worker, 1 << 60)
    assert await outcome(worker, 8) == [8]
    assert worker.unfinished == 0


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_out_of_memory_errors_are_converted(error: Exception) -> None:
    assert isinstance(service_error(error), OutOfMemory)


def test_other_errors_are_unchanged() -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert service_error(error) is error
