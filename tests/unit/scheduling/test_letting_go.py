"""A request that has ended for any reason is closed, no longer counted, and freed."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress

import pytest
from tests.unit.scheduling.jobs import LIMIT, all_of, idle, job, submitted

from januslens_server.errors import CancelCheck
from januslens_server.scheduling.job import QueuedRequest, ResultBuffer
from januslens_server.scheduling.worker import DeviceWorker


class Tensor:
    """Stands for a tensor in the device's memory."""


@pytest.fixture
def worker() -> DeviceWorker:
    return DeviceWorker(max_waiting=8)


async def test_a_cancelled_request_is_closed_on_the_devices_thread(worker: DeviceWorker) -> None:
    request, closed_by = QueuedRequest(None), list[str]()

    def run(_check_cancelled: CancelCheck) -> Iterator[int]:
        try:
            while True:
                yield 3
        finally:
            closed_by.append(threading.current_thread().name)

    buffer = submitted(worker, run, request)
    await all_of(submitted(worker, job(1)))  # the endless one is set aside
    request.cancel()
    buffer.abandon()
    assert await idle(worker)
    assert closed_by == ["device-worker"]


async def test_request_is_released_if_its_reader_leaves_during_a_step(worker: DeviceWorker) -> None:
    """The step fills the buffer after the reader has left, so nothing would resume the request."""
    stepping, left, request = threading.Event(), threading.Event(), QueuedRequest(None)

    def run(_check_cancelled: CancelCheck) -> Iterator[int]:
        stepping.set()
        assert left.wait(5)
        yield 10 * LIMIT

    buffer = submitted(worker, run, request)
    assert await asyncio.to_thread(stepping.wait, 5)
    request.cancel()
    buffer.abandon()
    left.set()
    assert await idle(worker)


async def test_data_of_a_finished_request_is_released(worker: DeviceWorker) -> None:
    """Its tensors and unread results are freed, even if no other request follows."""
    held: list[weakref.ref[Tensor]] = []

    def run(_check_cancelled: CancelCheck) -> Iterator[Tensor]:
        activations = Tensor()
        while True:
            result = Tensor()
            held.extend(map(weakref.ref, (activations, result)))
            yield result

    def left_unread() -> None:
        request = QueuedRequest(None)
        buffer: ResultBuffer[Tensor] = ResultBuffer(LIMIT, lambda _: LIMIT)
        worker.submit(run, buffer, request)
        while not held:
            time.sleep(0.001)
        request.cancel()
        buffer.abandon()

    gc.disable()
    try:
        left_unread()
        assert await idle(worker)
        await asyncio.sleep(0.05)  # until its last callbacks on this loop have run
        assert [reference() for reference in held] == [None] * len(held)
    finally:
        gc.enable()


async def test_data_of_a_failed_request_is_released(worker: DeviceWorker) -> None:
    """The traceback of an error refers to all its frames, and to their tensors."""
    held: list[weakref.ref[Tensor]] = []

    def run(_check_cancelled: CancelCheck) -> Iterator[int]:
        activations = Tensor()
        held.append(weakref.ref(activations))
        yield 1
        raise ValueError("mine")

    async def fail() -> None:
        buffer = submitted(worker, run)
        with suppress(ValueError):
            await all_of(buffer)

    gc.disable()
    try:
        await fail()
        assert await idle(worker)
        await asyncio.sleep(0.05)
        assert [reference() for reference in held] == [None]
    finally:
        gc.enable()
