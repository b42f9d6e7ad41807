"""Finding a prompt's subject among its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from januslens_server.errors import InvalidRequest
from januslens_server.lens.segments import Segment, segment_positions
from januslens_server.pipelines.losses import Objective
from januslens_server.results import Token
from januslens_server.specs import Prompt, Span, Text


def read_segments(
    subject: str | Span | None, prompt: Prompt, objective: Objective
) -> dict[Segment, list[int]]:
    """The prompt's segments with their positions; none without a subject.

    Raises `InvalidRequest` if the subject is not in the prompt.
    """
    if subject is None:
        return {}
    tokens = objective.tokens[: objective.prompt_length]
    span = _find(subject, prompt, tokens) if isinstance(subject, str) else subject
    if not 0 <= span.start < span.end <= len(tokens):
        raise InvalidRequest(
            "subject.span",
            f"expected 0 <= start < end <= {len(tokens)}, got {span.start} to {span.end}",
        )
    return segment_positions(span.start, span.end, len(tokens))


def _find(subject: str, prompt: Prompt, tokens: Sequence[Token]) -> Span:
    """The tokens that the last occurrence of `subject` in the prompt touches.

    Looked up among the characters of a prompt that is a text, since tokenizers change them
    (letter case, composed characters, spaces), and among the bytes of tokens given by their ids.
    """
    wanted: str | bytes = subject.strip()
    if isinstance(prompt, tuple):
        wanted = subject.strip().encode()
        whole: str | bytes = b"".join(token.raw for token in tokens)
        ends = list(accumulate(len(token.raw) for token in tokens))
        spans = list(zip([0, *ends], ends, strict=False))
    else:
        whole = prompt.text if isinstance(prompt, Text) else prompt
        spans = [(token.start or 0, token.end or 0) for token in tokens]
    start = whole.rfind(wanted)  # type: ignore[arg-type]  # both are text, or both bytes
    end = start + len(wanted)
    touched = [i for i, (first, last) in enumerate(spans) if first < end and last > start]
    if not wanted or start < 0 or not touched:
        raise InvalidRequest("subject.text", f"expected a part of the prompt, got {subject!r}")
    return Span(touched[0], touched[-1] + 1)
