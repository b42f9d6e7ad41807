"""How long every text and every list of a request may be: bounds on work before any is done.

They are above what any model takes; what this model takes is `decode`'s and the pipelines' to say.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.protobuf.message import Message

from januslens_server.errors import InvalidRequest

KIB, MIB = 2**10, 2**20

# By message and field: bytes of a text in UTF-8, bytes, or entries of a list. A field of a request
# that is not here fails a test (tests/contract/test_bounds.py). docs/api.md has the table too.
BOUNDS: dict[str, int] = {
    "DescentStep.layers": 4 * KIB,
    "DescentStep.matrices": 64,
    "FindNeuronsRequest.layers": 4 * KIB,
    "FindNeuronsRequest.model": 256,
    "FindNeuronsRequest.page_token": 256,
    "FindNeuronsRequest.revision": 256,
    "GradientLensRequest.layers": 4 * KIB,
    "GradientLensRequest.matrices": 64,
    "GradientLensRequest.model": 256,
    "GradientLensRequest.revision": 256,
    "Input.prompt": MIB,
    "ListModelsRequest.page_token": 256,
    "PreviewEditRequest.model": 256,
    "PreviewEditRequest.probes": 64,
    "PreviewEditRequest.revision": 256,
    "Probe.label": 4 * KIB,
    "ProjectRequest.model": 256,
    "Subject.text": 64 * KIB,
    "Target.text": 64 * KIB,
    "Tensor.data": 4 * MIB,
    "Tensor.shape": 8,
    "TokenIds.ids": MIB,
    "TokenizeRequest.model": 256,
    "TokenizeRequest.text": 128 * KIB,
    "TraceRequest.layers": 4 * KIB,
    "TraceRequest.model": 256,
    "TraceRequest.node_kinds": 64,
    "TraceRequest.positions": 64 * KIB,
    "TraceRequest.revision": 256,
}

# Tokens of one Tokenize. Their one answer is serialised on the event loop, where it must not hold
# up other calls for long.
MAX_TOKENS = 32 * KIB


def check_bounds(request: Message, path: str = "") -> None:
    """Raise `InvalidRequest` for the first field that is longer than its bound."""
    for field, value in request.ListFields():
        where = f"{path}{field.name}"
        limit = BOUNDS.get(f"{request.DESCRIPTOR.name}.{field.name}")
        if limit is not None:
            _check(field, value, limit, where)
        for i, inner in enumerate(_messages(field, value)):
            check_bounds(inner, f"{where}[{i}]." if field.is_repeated else f"{where}.")


def _check(field: Any, value: Any, limit: int, where: str) -> None:
    if field.is_repeated:
        length, unit = len(value), "entries"
    else:
        length, unit = len(value.encode() if isinstance(value, str) else value), "bytes"
    if length > limit:
        raise InvalidRequest(where, f"expected at most {limit} {unit}, got {length}")


def _messages(field: Any, value: Any) -> Iterable[Message]:
    if field.message_type is None:
        return ()
    return value if field.is_repeated else (value,)
