"""Who may ask: this page, opened by the one who started it.

A browser runs other sites' scripts on the same machine, and other users may share it. So a request
must carry the token of this run, which only the printed address holds, and must not come from
another site. `TrustedHostMiddleware` refuses foreign names for this host (DNS rebinding).
"""

from __future__ import annotations

import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_HEADER = "x-januslens-token"  # noqa: S105 - its name, not its value
_OPEN = ("GET", "HEAD")  # the empty pages hold nothing of anybody's
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "frame-ancestors 'self'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """Refuses other sites' requests, and what asks for more than a page without the run's token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 403."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope["method"], Headers(scope=scope))
        if refusal:
            answer = JSONResponse({"error": {"code": "PERMISSION_DENIED", "message": refusal}}, 403)
            await answer(scope, receive, send)
            return

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, sent)

    def _refusal(self, method: str, headers: Headers) -> str:
        """Why the request is refused; empty if it is not."""
        own = f"http://{headers.get('host')}"
        if headers.get("origin", own) != own:
            return f"expected a request from {own}; got one from {headers['origin']}"
        given = headers.get(TOKEN_HEADER, "").encode()
        if method not in _OPEN and not secrets.compare_digest(given, self._token.encode()):
            return "this run's token is missing: open the address that januslens ui printed"
        return ""
