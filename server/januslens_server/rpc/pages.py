"""Page tokens: the offset of a page, bound to the list that it belongs to."""

from __future__ import annotations

import hashlib
import re

from januslens.v1 import neurons_pb2
from januslens_server.errors import InvalidRequest

# The list of the configured models.
MODELS = "models"

_TOKEN = re.compile(r"([1-9][0-9]{0,8})\.(\w+)", re.ASCII)


def neurons_list(request: neurons_pb2.FindNeuronsRequest, revision: str) -> str:
    """What tells the neurons that a request lists from others, whatever its pages' size."""
    asked = neurons_pb2.FindNeuronsRequest(
        token=request.token, suppressed=request.suppressed, layers=request.layers
    )
    text = asked.SerializeToString(deterministic=True) + revision.encode()
    return hashlib.sha256(text).hexdigest()[:16]


def page_token(start: int, listed: str, total: int) -> str:
    """The token of the page that begins with entry `start` of `total`; empty behind the last."""
    return f"{start}.{listed}" if start < total else ""


def page_start(token: str, listed: str, total: int | None = None) -> int:
    """The entry that a page begins with.

    Raises `InvalidRequest` for a token that was not issued for this list, or lies behind `total`.
    """
    if not token:
        return 0
    issued = _TOKEN.fullmatch(token)
    start = int(issued[1]) if issued and issued[2] == listed else None
    if start is None or (total is not None and start >= total):
        raise InvalidRequest("page_token", "expected the token of an earlier answer")
    return start
