"""Serve the live page: the page itself, the frames of its results, saved pages and RPCs.

A browser also runs scripts of other sites, and other users may share the machine. So a request must
carry the access token of this run, which is only in the printed address, and must not come from
another site. `TrustedHostMiddleware` rejects foreign host names (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import json
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Literal, TypedDict

import uvicorn
from google.protobuf.json_format import Parse, ParseError
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from januslens.assemblers import GenerateAssembler, GradientAssembler, InterveneAssembler
from januslens.errors import JanuslensError
from januslens.results.generation import GeneratedText
from januslens.results.gradient import EditPreview
from januslens.ui.rpc_proxy import Gateway, forward, forward_overview, parse, parse_trace
from januslens.v1 import edits_pb2, generation_pb2, gradient_lens_pb2, intervene_pb2
from januslens.viewer.html import page, trace_page

TOKEN_HEADER = "x-januslens-token"  # noqa: S105 - the header's name
_OPEN = ("GET", "HEAD")  # the empty pages contain no data
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "frame-ancestors 'self'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """Reject requests from other sites, and POST requests without the access token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the request, or respond with 403."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope["method"], Headers(scope=scope))
        if refusal:
            response = JSONResponse(
                {"error": {"code": "PERMISSION_DENIED", "message": refusal}}, 403
            )
            await response(scope, receive, send)
            return

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, sent)

    def _refusal(self, method: str, headers: Headers) -> str:
        """Return why the request is rejected, or an empty string."""
        own = f"http://{headers.get('host')}"
        if headers.get("origin", own) != own:
            return f"request from another site: {headers['origin']!r}; expected {own!r}"
        given = headers.get(TOKEN_HEADER, "").encode()
        if method not in _OPEN and not secrets.compare_digest(given, self._token.encode()):
            return "missing or wrong access token: open the address printed by januslens ui"
        return ""


ResultView = Literal["trace", "gradient", "generation", "effects"]

_PREVIEW = "preview:"
_VARIANT = "generation:"
_KNOCK_OUT = "knock-out:"
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_STOP_SECONDS = 2  # for open streams when the server stops

Streams = Mapping[str, list[str]]


class State(TypedDict):
    """The contents of `request.state`."""

    gateway: Gateway


def serve(
    connect: Callable[[], Gateway],
    host: str,
    port: int,
    *,
    exposed: bool,
    announce: Callable[[str], object],
) -> None:
    """Serve the live page until interrupted.

    Args:
        connect: Creates the client of the gRPC server.
        host: An address of this machine, or `localhost`.
        port: Port to listen on; 0 = any free port.
        exposed: Allow a host that is not loopback.
        announce: Called with the page's address, including the access token, once it listens.

    Raises:
        ValueError: The host is not loopback and not exposed, or is a wildcard address.
        OSError: The port is in use, or the address does not belong to this machine.
    """
    listener = _listener(host, port, exposed)
    token = secrets.token_urlsafe(24)
    shown = f"[{host}]" if ":" in host else host
    app = application(connect, {*_LOOPBACK_NAMES, shown}, token)
    config = uvicorn.Config(
        app,
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=_STOP_SECONDS,
    )
    announce(f"http://{shown}:{listener.getsockname()[1]}/#token={token}")
    uvicorn.Server(config).run(sockets=[listener])


def _listener(host: str, port: int, exposed: bool) -> socket.socket:
    family, address = _resolved(host, port)
    if address.is_unspecified:
        raise ValueError(f"{host} is a wildcard address; expected a single address")
    if not (address.is_loopback or exposed):
        raise ValueError(f"{host} is not loopback; allow other machines with --expose")
    return socket.create_server((str(address), port), family=family)


def _resolved(
    host: str, port: int
) -> tuple[socket.AddressFamily, ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Resolve a host name once, so that the checked address is the one listened on."""
    family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, ipaddress.ip_address(where[0])


def application(connect: Callable[[], Gateway], hosts: Iterable[str], token: str) -> Starlette:
    """Return the application.

    Args:
        connect: Creates the client of the gRPC server; called once, in the event loop.
        hosts: Accepted values of the Host header.
        token: Access token that requests must carry; see `Guard`.
    """

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[State]:
        async with connect() as gateway:
            yield {"gateway": gateway}

    return Starlette(
        routes=[
            Route("/", live_page),
            *(Route(f"/frame/{view}", frame(view)) for view in _SAVED),
            *(Route(f"/page/{view}", saved(view), methods=["POST"]) for view in _SAVED),
            Route("/api/overview", forward_overview, methods=["POST"]),
            Route("/api/{method}", forward, methods=["POST"]),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
            Middleware(Guard, token=token),
        ],
        lifespan=lifespan,
    )


async def live_page(_request: Request) -> Response:
    """Return the live page."""
    return HTMLResponse(page("live", "Januslens", {}))


def frame(view: ResultView) -> Callable[[Request], Response]:
    """Return a handler for the empty page of a view, which the live page fills."""

    def empty(_request: Request) -> Response:
        return HTMLResponse(page(view, f"{view} · Januslens", {}, live=True))

    return empty


def saved(view: ResultView) -> Callable[[Request], Awaitable[Response]]:
    """Return a handler for saving a result as a page, from the JSON lines of its streams."""

    async def page_of(request: Request) -> Response:
        try:
            return HTMLResponse(_SAVED[view](json.loads(await request.body())))
        except (ValueError, TypeError, KeyError, ParseError, JanuslensError) as error:
            return PlainTextResponse(f"invalid result: {error}; expected its JSON lines", 400)

    return page_of


def _trace(streams: Streams) -> str:
    trace = parse_trace(streams["trace"])
    overview = streams.get("overview")
    around = parse_trace(overview).responses if overview else ()
    response = intervene_pb2.InterveneResponse
    knock_outs = {
        name.removeprefix(_KNOCK_OUT): [
            Parse(line, response(), ignore_unknown_fields=True) for line in lines
        ]
        for name, lines in streams.items()
        if name.startswith(_KNOCK_OUT)
    }
    names = "\n".join(streams.get("names", ()))
    return trace_page(trace.responses, around, trace.prompt_tokens, knock_outs, names)


def _gradient(streams: Streams) -> str:
    previews = {
        name.removeprefix(_PREVIEW): EditPreview.from_message(
            Parse(lines[0], edits_pb2.PreviewEditResponse(), ignore_unknown_fields=True)
        )
        for name, lines in streams.items()
        if name.startswith(_PREVIEW)
    }
    response = gradient_lens_pb2.GradientLensResponse
    return parse(streams["gradient"], GradientAssembler(), response).to_html(previews)


def _generation(streams: Streams) -> str:
    others = {
        name.removeprefix(_VARIANT): _generated(lines)
        for name, lines in streams.items()
        if name.startswith(_VARIANT)
    }
    return _generated(streams["generation"]).to_html(others)


def _generated(lines: list[str]) -> GeneratedText:
    return parse(lines, GenerateAssembler(GeneratedText), generation_pb2.GenerateResponse)


def _effects(streams: Streams) -> str:
    response = intervene_pb2.InterveneResponse
    return parse(streams["effects"], InterveneAssembler(), response).to_html()


_SAVED: dict[ResultView, Callable[[Streams], str]] = {
    "trace": _trace,
    "gradient": _gradient,
    "generation": _generation,
    "effects": _effects,
}
