"""The pages: the one that asks, the frames that it fills, and answers saved as files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Literal

from google.protobuf.json_format import Parse, ParseError
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from januslens._results.edits import EditPreview
from januslens.errors import JanuslensError
from januslens.ui.recorded import gradient_so_far, trace_so_far
from januslens.v1 import edits_pb2
from januslens.viewer.page import page

VIEWS: tuple[Literal["trace", "gradient"], ...] = ("trace", "gradient")

_PREVIEW = "preview:"

Streams = Mapping[str, list[str]]


async def asking(_request: Request) -> Response:
    """The page that a person opens."""
    return HTMLResponse(page("live", "Januslens", {}))


def frame(view: Literal["trace", "gradient"]) -> Callable[[Request], Response]:
    """The empty page of one answer, which the page around it fills."""

    def empty(_request: Request) -> Response:
        return HTMLResponse(page(view, f"{view} · Januslens", {}, live=True))

    return empty


async def saved_trace(request: Request) -> Response:
    """A trace as a page to keep, from its streams' lines by name."""
    return await _saved(request, _trace)


async def saved_gradient(request: Request) -> Response:
    """A gradient as a page to keep, likewise."""
    return await _saved(request, _gradient)


async def _saved(request: Request, made: Callable[[Streams], str]) -> Response:
    try:
        return HTMLResponse(made(json.loads(await request.body())))
    except (ValueError, TypeError, KeyError, ParseError, JanuslensError) as error:
        return PlainTextResponse(f"expected the lines of an answer: {error}", 400)


def _trace(streams: Streams) -> str:
    around = streams.get("overview")
    return trace_so_far(streams["trace"]).to_html(trace_so_far(around) if around else None)


def _gradient(streams: Streams) -> str:
    previews = {
        name.removeprefix(_PREVIEW): EditPreview.from_message(
            Parse(lines[0], edits_pb2.PreviewEditResponse())
        )
        for name, lines in streams.items()
        if name.startswith(_PREVIEW)
    }
    return gradient_so_far(streams["gradient"]).to_html(previews)
