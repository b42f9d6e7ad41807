"""From one question to its answer, by one call or, where the client resumes, by several.

gRPC itself repeats a call that no server has begun to serve (`_connection.SERVICE_CONFIG`). A
server says that it has begun by its headers, and from then on nothing is repeated in silence: what
was cut raises, or, with `resume=True`, is asked for again under an id of its own, with a warning in
the log `januslens`.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Generic, cast

import grpc
from google.protobuf.message import Message

from januslens._connection import Attempt, Connection
from januslens._status import FailedCall, was_cut
from januslens._stream.assembler import EventT, ResultT
from januslens._stream.splice import OtherAnswer
from januslens._verbs.calls import StreamCall, UnaryCall
from januslens.errors import JanuslensError, StreamInterrupted, Unavailable

logger = logging.getLogger("januslens")

# How many calls in a row may fail before they have brought anything new. The first is made at once,
# the others after 1, 2, 4 seconds: a server that is started again needs some.
FRUITLESS = 4


class Course:
    """The calls made so far for one question, and what the next one is to be."""

    def __init__(self, connection: Connection, call: UnaryCall | StreamCall[Any, Any, Any]) -> None:
        self.connection = connection
        self.method = call.method
        self.request: Message = call.request
        self.attempt = Attempt(connection)
        seconds = connection.seconds(call.timeout)
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._fruitless = 0

    @property
    def timeout(self) -> float | None:
        """Seconds that are left for the next call."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def cut(self, error: grpc.RpcError) -> None:
        """A call failed: get ready for the next one, or raise what ends the course.

        Raises:
            JanuslensError: The failure, unless it is one that the client resumes from.
        """
        call = cast("FailedCall", error)
        failure = self.attempt.failure(call)
        if not (self.connection.resume and was_cut(call) and self._hopeful()):
            raise failure from error
        self._again(failure)

    @property
    def pause(self) -> float:
        """Seconds to wait before the next call."""
        return 0.0 if self._fruitless < 2 else 2.0 ** (self._fruitless - 2)

    def _hopeful(self) -> bool:
        self._fruitless += 1
        return self._fruitless <= FRUITLESS

    def _again(self, failure: JanuslensError) -> None:
        before, self.attempt = self.attempt, Attempt(self.connection)
        logger.warning(
            "%s %s was cut (%s: %s); going on as %s",
            self.method,
            before.request_id,
            failure.code,
            failure.message,
            self.attempt.request_id,
        )


class StreamCourse(Course, Generic[EventT, ResultT]):
    """A course whose calls stream."""

    def __init__(self, connection: Connection, call: StreamCall[Any, EventT, ResultT]) -> None:
        super().__init__(connection, call)
        self.interruptions: list[StreamInterrupted] = []
        self._assembler = call.assembler
        self._splice = call.splice if connection.resume else None
        self._due = 0

    def take(self, response: Any) -> list[EventT]:
        """The events that the next message completes.

        Raises:
            ProtocolViolation: It is not the next message, or does not continue the one before.
            StreamInterrupted: Another replica answered, but not the same.
        """
        if response.sequence != self._due:
            raise self._assembler.violation(
                f"expected message {self._due} of the stream; got {response.sequence}"
            )
        self._due += 1
        events = (self._read(message) for message in self._joined(response))
        return [event for event in events if event is not None]

    def _joined(self, response: Any) -> list[Any]:
        if self._splice is None:
            return [response]
        try:
            return self._splice.take(response)
        except OtherAnswer as error:
            raise self._assembler.interruption(str(error)) from error

    def _read(self, message: Any) -> EventT | None:
        self._fruitless = 0
        self.connection.seen(message)
        return self._assembler.feed(message)

    def result(self) -> ResultT:
        """The whole, once it has come.

        Raises:
            StreamInterrupted: It has not.
        """
        return self._assembler.result()

    @property
    def complete(self) -> bool:
        """Whether the summary has come."""
        return self._assembler.complete

    def cut(self, error: grpc.RpcError | None) -> None:
        """A call failed, or ended (None) before its summary; else as for any course."""
        if error is None:
            failure: JanuslensError = self._assembler.interruption()
        else:
            failure = self.attempt.failure(
                cast("FailedCall", error), self._assembler.partial(), self._assembler.interrupted
            )
        if isinstance(failure, StreamInterrupted):
            resumable = True
            self.interruptions.append(failure)
        else:  # no other replica is there yet
            resumable = bool(self.interruptions) and isinstance(failure, Unavailable)
        if self._splice is None or not resumable or not self._hopeful():
            raise failure from error
        self._splice.restart()
        self.request, self._due = self._splice.rest(), 0
        self._again(failure)
