"""Project: the caller's own vectors (probes, dictionary features) through a model's lens."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from januslens_server.errors import CancelCheck, InvalidRequest, NotFinite
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.inputs import read_single_target
from januslens_server.pipelines.vectors import read
from januslens_server.results import ProjectionTable
from januslens_server.specs import ProjectSpec


def project_vectors(
    model: ResidentModel, spec: ProjectSpec, check_cancelled: CancelCheck
) -> Iterator[ProjectionTable]:
    """Yield one table for all vectors.

    Raises `InvalidRequest` if they are not `[n, d_model]`, not finite or so large that their
    readings are not, or the target is not one token; and whatever `check_cancelled` raises, before
    every chunk of vectors that is projected.
    """
    d_model = model.view.facts.d_model
    if spec.vectors.shape[1] != d_model:
        raise InvalidRequest(
            "vectors.shape", f"expected [n, {d_model}] for {model.name}, got {spec.vectors.shape}"
        )
    vectors = torch.tensor(spec.vectors, device=model.device)
    if not bool(vectors.isfinite().all()):
        raise InvalidRequest("vectors.data", "expected finite numbers, got infinity or NaN")
    targets = None
    if spec.target is not None:
        target = read_single_target(model, spec.target, "target")
        targets = torch.full((len(vectors), 1), target, device=model.device)
    if not bool(vectors.norm(dim=-1).isfinite().all()):
        raise InvalidRequest(
            "vectors.data", "vector values too large: squaring overflows float32; scale them down"
        )
    try:
        table = read(model.view.lens, vectors, spec.lens, targets, check_cancelled)
    except NotFinite as error:
        raise InvalidRequest("vectors.data", f"{error}; scale the vectors down") from error
    yield table
