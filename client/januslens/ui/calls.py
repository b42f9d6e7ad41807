"""The contract over HTTP: POST /api/METHOD takes a request, answers its responses.

Both are canonical protobuf JSON; responses come one a line as they arrive, as `--json` prints them.
A call that fails ends with the line `{"error": {...}}`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.json_format import Parse, ParseError
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from januslens._results.json_lines import json_line
from januslens._verbs import trace_overview
from januslens.errors import JanuslensError
from januslens.ui.gateway import Gateway
from januslens.ui.recorded import trace_so_far
from januslens.v1 import service_pb2

_METHODS: dict[str, MethodDescriptor] = dict(
    service_pb2.DESCRIPTOR.services_by_name["IntrospectionService"].methods_by_name
)


async def call(request: Request) -> Response:
    """Forward one call; a browser that goes away cancels it."""
    method = _METHODS.get(request.path_params["method"])
    if method is None:
        return _refused(404, f"expected one of {', '.join(_METHODS)}")
    try:
        message = Parse(await request.body(), GetMessageClass(method.input_type)())
    except (UnicodeDecodeError, ParseError) as error:
        return _refused(400, f"expected a {method.input_type.name} as JSON: {error}")
    answered = _streamed if method.server_streaming else _single
    return _answer(answered(request.state.gateway, method.name, message))


async def overview(request: Request) -> Response:
    """What surrounds a trace: takes its header line and lens, answers a Trace's responses."""
    try:
        asked = json.loads(await request.body())
        surroundings = trace_overview(trace_so_far([asked["header"]]), lens=asked["lens"])
    except (ValueError, TypeError, KeyError, ParseError, JanuslensError) as error:
        return _refused(400, f"expected a trace's header and lens: {error}")
    messages = _streamed(request.state.gateway, "Trace", surroundings.request)
    return _answer(messages)


def _answer(messages: AsyncIterator[Message]) -> StreamingResponse:
    return StreamingResponse(_lines(messages), media_type="application/x-ndjson")


async def _lines(messages: AsyncIterator[Message]) -> AsyncIterator[str]:
    try:
        async for message in messages:
            yield f"{json_line(message)}\n"
    except JanuslensError as error:
        yield f"{json.dumps({'error': described(error)})}\n"


async def _single(gateway: Gateway, method: str, message: Message) -> AsyncIterator[Message]:
    yield await gateway.ask(method, message)


async def _streamed(gateway: Gateway, method: str, message: Message) -> AsyncIterator[Message]:
    async with gateway.stream(method, message) as stream:
        async for response in stream:
            yield response


def described(error: JanuslensError) -> dict[str, Any]:
    """What the page shows of an error: its message, and the details that the server gave."""
    return {"message": error.message, **asdict(error.details)}


def _refused(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": {"code": "INVALID_ARGUMENT", "message": text}}, status)
