"""The page and its calls as one ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TypedDict

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Route

from januslens.ui.calls import call, overview
from januslens.ui.gateway import Gateway
from januslens.ui.guard import Guard
from januslens.ui.page import VIEWS, asking, frame, saved_gradient, saved_trace


class State(TypedDict):
    """What every request finds in `request.state`."""

    gateway: Gateway


def application(connect: Callable[[], Gateway], hosts: Iterable[str], token: str) -> Starlette:
    """The application.

    Args:
        connect: Makes the client of the gRPC server; called once, in the event loop.
        hosts: The names by which browsers may call this host.
        token: What requests must carry; see `januslens.ui.guard`.
    """

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[State]:
        async with connect() as gateway:
            yield {"gateway": gateway}

    return Starlette(
        routes=[
            Route("/", asking),
            *(Route(f"/frame/{view}", frame(view)) for view in VIEWS),
            Route("/page/trace", saved_trace, methods=["POST"]),
            Route("/page/gradient", saved_gradient, methods=["POST"]),
            Route("/api/overview", overview, methods=["POST"]),
            Route("/api/{method}", call, methods=["POST"]),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
            Middleware(Guard, token=token),
        ],
        lifespan=lifespan,
    )
