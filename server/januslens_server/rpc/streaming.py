"""Run pipelines on the device thread and write their results to callers."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import partial
from typing import TypeVar

from google.protobuf.message import Message

from januslens_server import telemetry
from januslens_server.errors import CancelCheck
from januslens_server.rpc.call import Call
from januslens_server.rpc.encode import waiting_response
from januslens_server.rpc.places import ENCODING
from januslens_server.rpc.unread import Unread, UnreadStream, write_within
from januslens_server.rpc.wire import serialized
from januslens_server.scheduling.job import QueuedRequest, ResultBuffer
from januslens_server.scheduling.worker import DeviceWorker

# Seconds until a request reports that it waits, and between two reports.
FIRST_REPORT_SECONDS, REPORT_SECONDS = 0.5, 1.0

# Bytes of results in the buffer of a stream, above which its pipeline pauses.
BUFFER_BYTES = 4 * 2**20

Result = TypeVar("Result")
Run = Callable[[CancelCheck], Iterator[Result | None]]


class DeviceStreams:
    """Submits pipelines to the device worker and passes their results to callers."""

    def __init__(self, worker: DeviceWorker, stall_seconds: float, max_unread: int) -> None:
        """A stream whose caller reads nothing for `stall_seconds` is aborted.

        Above `max_unread` bytes of results that are not read, the slowest streams are.
        """
        self._unread = Unread(max_unread)
        self._open: dict[QueuedRequest, UnreadStream] = {}
        self._worker = worker
        self._stall_seconds = stall_seconds
        self._unfinished = 0
        self._none_left = asyncio.Event()
        self._none_left.set()

    @property
    def unfinished(self) -> int:
        """Number of requests whose results are not all delivered."""
        return self._unfinished

    async def wait_finished(self, seconds: float) -> bool:
        """Wait until all results are delivered; returns False after `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._none_left.wait()
        except TimeoutError:
            return False
        return True

    @asynccontextmanager
    async def running(
        self, run: Run[Result], request: QueuedRequest, call: Call
    ) -> AsyncGenerator[ResultBuffer[Result]]:
        """Run a pipeline and give the buffer of its results; leaving cancels the pipeline.

        When the request is in the queue, the call's headers are sent, and then its place in the
        queue if the caller asked for that.
        """
        with self._unread.stream(request.caller) as stream:
            buffer: ResultBuffer[Result] = ResultBuffer(BUFFER_BYTES, _bytes, stream.count)
            self._worker.submit(run, buffer, request)
            self._open[request] = stream
            self._count(1)
            try:
                await call.send_headers()
                if call.reports_waiting:
                    await self._report_waiting(request, buffer, call)
                yield buffer
            finally:
                self._count(-1)
                del self._open[request]
                self._worker.withdraw(request)
                buffer.abandon()

    async def _report_waiting(
        self, request: QueuedRequest, buffer: ResultBuffer[Result], call: Call
    ) -> None:
        """Write the request's place in the queue from time to time, until it starts."""
        seconds = FIRST_REPORT_SECONDS
        while not await buffer.begins(seconds):
            place = self._worker.waiting_place(request)
            if place is None:
                return
            message = serialized(waiting_response(call.method, place))
            await write_within(call.context, message, self._stall_seconds)
            call.sent(len(message))
            seconds = REPORT_SECONDS

    def _count(self, change: int) -> None:
        self._unfinished += change
        if self._unfinished:
            self._none_left.clear()
        else:
            self._none_left.set()

    async def write(
        self,
        results: AsyncGenerator[Result],
        encode: Callable[[Result], Iterable[Message | bytes]],
        call: Call,
    ) -> None:
        """Encode results in a worker thread and write them to the caller.

        Raises `ReaderStalled` if the caller does not read.
        """
        meter = StreamMeter(call.method, call.started)
        async with aclosing(results):
            async for result in results:
                work = partial(_serialized, encode, result)
                messages = deque(await ENCODING.run(call.request_id, work))
                del result, work  # the caller may read the messages late, or never
                stream = self._open[call.queued]
                stream.count(sum(map(len, messages)))
                while messages:
                    message = messages.popleft()
                    with meter.message(), stream.writing():
                        await write_within(
                            call.context, message, self._stall_seconds, stream.evicted
                        )
                    call.sent(len(message))
                    stream.count(-len(message))


class StreamMeter:
    """Measures how long the messages of a stream take to write, and when the first is sent."""

    def __init__(self, method: str, started: float) -> None:
        """`started` is the start of the call, by `time.perf_counter`."""
        self._method = method
        self._started = started
        self._any = False

    @contextmanager
    def message(self) -> Iterator[None]:
        """Measure the write of one message, even if it fails."""
        with telemetry.WRITE_STALL_SECONDS.time():
            yield
        if not self._any:
            self._any = True
            first = telemetry.FIRST_MESSAGE_SECONDS.labels(self._method)
            first.observe(time.perf_counter() - self._started)


def _serialized(
    encode: Callable[[Result], Iterable[Message | bytes]], result: Result
) -> list[bytes]:
    """Encode and serialize; runs in a thread, to keep the event loop free for health checks."""
    return [serialized(message) for message in encode(result)]


def _bytes(result: object) -> int:
    """Size of a result in its buffer; headers and summaries count 0."""
    return int(getattr(result, "nbytes", 0))
