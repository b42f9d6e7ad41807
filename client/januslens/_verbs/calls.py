"""What a verb hands to a client, which makes the calls.

A verb opens no connection. A unary one is a generator: it yields the calls to make, is sent their
responses and returns the result. A streaming one returns the call and the assembler to feed.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from januslens._stream.assembler import Assembler, EventT, ResponseT, ResultT
from januslens._stream.splice import Splice

ReturnT = TypeVar("ReturnT")


@dataclass(frozen=True)
class UnaryCall:
    """One message out, one back. `timeout` in seconds, None = the client's."""

    method: str
    request: Message
    timeout: float | None


@dataclass(frozen=True)
class StreamCall(Generic[ResponseT, EventT, ResultT]):
    """One message out, a stream back. `timeout` in seconds, None = the client's.

    `splice` joins the answers of several calls, where the client resumes what was cut.
    """

    method: str
    request: Message
    timeout: float | None
    assembler: Assembler[ResponseT, EventT, ResultT]
    splice: Splice[Any, ResponseT]


# The responses sent into it are of the type that belongs to the method just yielded.
Exchange = Generator[UnaryCall, Any, ReturnT]
