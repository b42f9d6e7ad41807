"""The page itself."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response


async def page(_request: Request) -> Response:
    """The viewer, waiting for a prompt."""
    return HTMLResponse("<!doctype html><title>Januslens</title>")
