"""What both streams have in common.

A stream is complete only with its summary; `sequence` counts 0, 1, 2 ...; a layer or a matrix may
span several messages, the last of which says so; a token's text comes once, with the message that
first needs it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, Protocol, TypeVar

from januslens._results.tokens import TokenTable
from januslens.errors import ErrorDetails, ProtocolViolation, StreamInterrupted


class Sequenced(Protocol):
    """A message of a stream."""

    @property
    def sequence(self) -> int:
        """Its place in the stream, from 0."""


ResponseT = TypeVar("ResponseT", bound=Sequenced)
EventT = TypeVar("EventT")
ResultT = TypeVar("ResultT")


class Assembler(ABC, Generic[ResponseT, EventT, ResultT]):
    """Takes a stream's messages one by one and gives back what they complete."""

    interrupted: ClassVar[type[StreamInterrupted]]

    def __init__(self) -> None:
        self.responses: list[ResponseT] = []
        self.tokens = TokenTable()
        self.request_id = ""

    def feed(self, response: ResponseT) -> EventT | None:
        """Take the next message; return the event that it completes, if it does.

        Raises:
            ProtocolViolation: It is not the next message, or does not continue the one before.
        """
        due = len(self.responses)
        if response.sequence != due:
            raise self.violation(f"expected message {due} of the stream; got {response.sequence}")
        self.responses.append(response)
        return self._read(response)

    def result(self) -> ResultT:
        """The whole.

        Raises:
            StreamInterrupted: The summary has not come; `partial` holds what has.
            ProtocolViolation: The summary came, but no header.
        """
        if not self.complete:
            raise self.interruption()
        whole = self.partial()
        if whole is None:
            raise self.violation("expected a header before the summary; got none")
        return whole

    def interruption(self, text: str | None = None) -> StreamInterrupted:
        """The error to raise where the stream ends before its summary."""
        details = ErrorDetails("DATA_LOSS", "STREAM_INTERRUPTED", self.request_id, retry_after=0.0)
        came = f"the stream ended after {len(self.responses)} messages, without its summary"
        return self.interrupted(text or came, details, self.partial())

    def violation(self, text: str) -> ProtocolViolation:
        """The error to raise where the stream is not what the contract allows."""
        details = ErrorDetails("DATA_LOSS", "PROTOCOL_VIOLATION", self.request_id)
        return ProtocolViolation(text, details, self.partial())

    @abstractmethod
    def partial(self) -> ResultT | None:
        """What has come so far; None before the header."""

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether the summary has come."""

    @abstractmethod
    def _read(self, response: ResponseT) -> EventT | None:
        """Read a message that is in its place; None if it completes nothing, or is unknown."""
