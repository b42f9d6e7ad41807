"""Project the caller's own vectors, such as probes or dictionary features, to the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from januslens_server.errors import CancelCheck, InvalidRequest, NotFinite
from januslens_server.pipelines.metrics import read
from januslens_server.pipelines.resolve import ResolvedProject
from januslens_server.results import ProjectionTable


def project_vectors(
    request: ResolvedProject, check_cancelled: CancelCheck
) -> Iterator[ProjectionTable]:
    """Yield one table with the projections of all vectors.

    `check_cancelled` is called before each chunk of vectors; what it raises ends the request.
    Raises `InvalidRequest` if vectors, or their projections, contain infinity or NaN.
    """
    model, spec = request.model, request.spec
    vectors = torch.tensor(spec.vectors, device=model.device)
    if not bool(vectors.isfinite().all()):
        raise InvalidRequest("vectors.data", "vectors contain infinity or NaN; send finite numbers")
    targets = None
    if request.target is not None:
        targets = torch.full((len(vectors), 1), request.target, device=model.device)
    if not bool(vectors.norm(dim=-1).isfinite().all()):
        raise InvalidRequest(
            "vectors.data", "vector values too large: squaring overflows float32; scale them down"
        )
    try:
        table = read(model.view.lens, vectors, spec.lens, targets, check_cancelled)
    except NotFinite as error:
        raise InvalidRequest("vectors.data", f"{error}; scale the vectors down") from error
    yield table
