"""Reject requests from other sites and from other users of the machine.

A browser also runs scripts of other sites, and other users may share the machine. So a request must
carry the access token of this run, which is only in the printed address, and must not come from
another site. `TrustedHostMiddleware` rejects foreign host names (DNS rebinding).
"""

from __future__ import annotations

import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
