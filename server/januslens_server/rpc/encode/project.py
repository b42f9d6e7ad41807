"""The answer to Project as a message."""

from __future__ import annotations

from itertools import chain
from typing import Any

from januslens.v1 import lens_pb2
from januslens_server.results import ProjectionTable, Provenance
from januslens_server.rpc.encode.shared import (
    ReadToken,
    TokenTexts,
    named_tokens,
    projections,
    provenance_message,
)


def project_response(
    table: ProjectionTable, provenance: Provenance, read_token: ReadToken
) -> lens_pb2.ProjectResponse:
    """One projection a vector, empty for a zero vector, and the texts of all tokens named."""
    read: list[Any] = [projection or {} for projection in projections(table)]
    return lens_pb2.ProjectResponse(
        projections=read,
        tokens=TokenTexts(read_token).texts(chain.from_iterable(named_tokens(table))),
        provenance=provenance_message(provenance),
    )
