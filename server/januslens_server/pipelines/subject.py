"""Finding a prompt's subject among its tokens."""

from __future__ import annotations

from collections.abc import Sequence

from januslens_server.errors import InvalidRequest
from januslens_server.lens.segments import Segment, segment_positions
from januslens_server.pipelines.losses import Objective
from januslens_server.results import Token
from januslens_server.specs import Span


def read_segments(subject: str | Span | None, objective: Objective) -> dict[Segment, list[int]]:
    """The prompt's segments with their positions; none without a subject.

    Raises `InvalidRequest` if the subject is not in the prompt.
    """
    if subject is None:
        return {}
    prompt = objective.tokens[: objective.prompt_length]
    span = _find(subject, prompt) if isinstance(subject, str) else subject
    if not 0 <= span.start < span.end <= len(prompt):
        raise InvalidRequest(
            "subject.span",
            f"expected 0 <= start < end <= {len(prompt)}, got {span.start} to {span.end}",
        )
    return segment_positions(span.start, span.end, len(prompt))


def _find(text: str, prompt: Sequence[Token]) -> Span:
    """The tokens that the last occurrence of `text` touches."""
    whole = b"".join(token.raw for token in prompt)
    wanted = text.strip().encode()
    start = whole.rfind(wanted)
    if not wanted or start < 0:
        raise InvalidRequest("subject.text", f"expected a part of the prompt, got {text!r}")
    touched = []
    end = 0
    for i, token in enumerate(prompt):
        begin, end = end, end + len(token.raw)
        if begin < start + len(wanted) and end > start:
            touched.append(i)
    return Span(touched[0], touched[-1] + 1)
