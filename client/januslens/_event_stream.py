"""A stream's events one by one, for the synchronous client."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, Self

import grpc

from januslens._course import StreamCourse
from januslens._stream.assembler import EventT, ResultT
from januslens.errors import StreamInterrupted


class Responses(Protocol):
    """A call whose responses are still coming."""

    def __iter__(self) -> Iterator[Any]: ...
    def __next__(self) -> Any: ...
    def cancel(self) -> object: ...


class EventStream(Generic[EventT, ResultT]):
    """The header, the layers or matrices as they arrive, the summary.

    Iterate over it; `result()` is the whole. Closing it, or leaving its `with` block, cancels the
    call if it still runs, and iteration ends.
    """

    def __init__(
        self,
        start: Callable[[StreamCourse[EventT, ResultT]], Responses],
        course: StreamCourse[EventT, ResultT],
    ) -> None:
        self._start = start
        self._course = course
        self._ready: deque[EventT] = deque()
        self._closed = False
        self._open()

    def _open(self) -> None:
        self._call = self._start(self._course)

    @property
    def interruptions(self) -> tuple[StreamInterrupted, ...]:
        """Where the stream was cut and went on at another replica, with `resume=True`."""
        return tuple(self._course.interruptions)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> EventT:
        """The next event.

        Raises:
            StreamInterrupted: The stream was cut; `partial` holds what had come.
            JanuslensError: The call failed, likewise.
        """
        while not self._closed:
            if self._ready:
                return self._ready.popleft()
            self._advance()
        raise StopIteration

    def _advance(self) -> None:
        """Take the next message, or open the next call where this one was cut."""
        try:
            response = next(self._call)
        except StopIteration:
            if self._course.complete:
                raise
            self._course.cut(None)
        except grpc.RpcError as error:
            self._course.cut(error)
        else:
            self._ready.extend(self._course.take(response))
            return
        time.sleep(self._course.pause)
        self._open()

    def result(self) -> ResultT:
        """The whole, once everything has arrived; waits for what has not.

        Raises:
            StreamInterrupted: The stream ended without its summary, or was closed before it.
            JanuslensError: The call failed; `partial` holds what had come.
        """
        for _ in self:
            pass
        return self._course.result()

    def close(self) -> None:
        """Cancel the call if it still runs; the server stops computing."""
        self._closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
