"""Forward RPCs over HTTP: POST /api/METHOD takes a request and streams its responses.

Requests and responses are canonical protobuf JSON, one response per line, as `--json` prints them.
If the call fails, the last line is `{"error": {...}}`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import asdict
from typing import Any, TypeVar

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.json_format import Parse, ParseError
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from januslens._requests import overview_request
from januslens.aio import AsyncClient, AsyncEventStream
from januslens.assemblers import Assembler, TraceAssembler
from januslens.errors import JanuslensError, StreamInterrupted
from januslens.results.exports import json_line
from januslens.results.trace import Trace
from januslens.v1 import service_pb2, trace_pb2

MessageT = TypeVar("MessageT", bound=Any)
ResultT = TypeVar("ResultT")

_METHODS: dict[str, MethodDescriptor] = dict(
    service_pb2.DESCRIPTOR.services_by_name["IntrospectionService"].methods_by_name
)


class ForwardingAssembler(Assembler[Any, Message, list[Any]]):
    """Check that a stream is complete, and pass every message on unchanged."""

    interrupted = StreamInterrupted

    def __init__(self) -> None:
        super().__init__()
        self.responses: list[Any] = []

    def partial(self) -> list[Any]:
        """Return the messages received so far."""
        return self.responses

    @property
    def complete(self) -> bool:
        """Whether the summary has arrived."""
        return bool(self.responses) and self.responses[-1].WhichOneof("event") == "summary"

    def _read_waiting(self, response: Any) -> Message:
        message: Message = response
        return message

    def _read(self, response: Any) -> Message:
        self.responses.append(response)
        message: Message = response
        return message


class Gateway(AsyncClient):
    """An asynchronous client that forwards protobuf requests instead of building them."""

    async def call(self, method: str, request: Message) -> Message:
        """Call a unary method.

        Raises:
            JanuslensError: The call failed.
        """
        response: Message = await self._send(method, request, None)
        return response

    def stream(self, method: str, request: Message) -> AsyncEventStream[Message, list[Any]]:
        """Call a streaming method; leaving the `async with` block cancels the call."""
        return self._stream(method, request, None, ForwardingAssembler())


async def forward(request: Request) -> Response:
    """Forward one call; closing the connection cancels it."""
    name = request.path_params["method"]
    method = _METHODS.get(name)
    if method is None:
        return _invalid(404, f"unknown method {name!r}; expected one of {', '.join(_METHODS)}")
    try:
        message = Parse(await request.body(), GetMessageClass(method.input_type)())
    except (UnicodeDecodeError, ParseError) as error:
        return _invalid(400, f"invalid JSON for {method.input_type.name}: {error}")
    responses = _streamed if method.server_streaming else _single
    return _ndjson(responses(request.state.gateway, method.name, message))


async def forward_overview(request: Request) -> Response:
    """Trace the residual stream around a trace, given the trace's header line and its lens."""
    try:
        body = json.loads(await request.body())
        message = overview_request(parse_trace([body["header"]]), lens=body["lens"])
    except (ValueError, TypeError, KeyError, ParseError, JanuslensError) as error:
        return _invalid(400, f"invalid overview request: {error}; expected a header and a lens")
    return _ndjson(_streamed(request.state.gateway, "Trace", message))


def parse_trace(lines: Iterable[str]) -> Trace:
    """Parse the JSON lines of a trace; see `parse`."""
    return parse(lines, TraceAssembler(), trace_pb2.TraceResponse)


def parse(
    lines: Iterable[str],
    assembler: Assembler[MessageT, Any, ResultT],
    response: Callable[[], MessageT],
) -> ResultT:
    """Parse the JSON lines of a stream, which may be incomplete. Unknown fields are ignored.

    Raises:
        ValueError: The header is missing.
        ProtocolViolation: A message is missing.
        google.protobuf.json_format.ParseError: A line is not such a response.
    """
    for line in lines:
        assembler.feed(Parse(line, response(), ignore_unknown_fields=True))
    result = assembler.partial()
    if result is None:
        raise ValueError("the stream has no header")
    return result


def _ndjson(messages: AsyncIterator[Message]) -> StreamingResponse:
    return StreamingResponse(_lines(messages), media_type="application/x-ndjson")


async def _lines(messages: AsyncIterator[Message]) -> AsyncIterator[str]:
    try:
        async for message in messages:
            yield f"{json_line(message)}\n"
    except JanuslensError as error:
        yield f"{json.dumps({'error': error_details(error)})}\n"


async def _single(gateway: Gateway, method: str, message: Message) -> AsyncIterator[Message]:
    yield await gateway.call(method, message)


async def _streamed(gateway: Gateway, method: str, message: Message) -> AsyncIterator[Message]:
    async with gateway.stream(method, message) as stream:
        async for response in stream:
            yield response


def error_details(error: JanuslensError) -> dict[str, Any]:
    """Return an error's message and the details from the server, for the page."""
    return {"message": error.message, **asdict(error.details)}


def _invalid(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": {"code": "INVALID_ARGUMENT", "message": text}}, status)
