"""The page of a trace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from januslens._results.token_text import OPEN_BOX
from januslens._results.tokens import Token
from januslens.v1 import trace_pb2
from januslens.viewer.page import page


def trace_page(
    responses: Iterable[trace_pb2.TraceResponse],
    overview: Iterable[trace_pb2.TraceResponse],
    prompt: Sequence[Token],
) -> str:
    """A trace's stream, and that of its surroundings, as one page."""
    title = "".join(str(token) for token in prompt).replace(OPEN_BOX, " ")
    return page("trace", f"{title.strip()} · Januslens", {"trace": responses, "overview": overview})
