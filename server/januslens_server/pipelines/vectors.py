"""Reading a request's vectors, and counting them."""

from __future__ import annotations

import torch

from januslens_server import telemetry
from januslens_server.errors import CancelCheck
from januslens_server.lens.head import LensHead
from januslens_server.lens.projection import project
from januslens_server.results import ProjectionTable
from januslens_server.specs import LensSpec


def read(
    head: LensHead,
    vectors: torch.Tensor,
    spec: LensSpec,
    targets: torch.Tensor | None,
    check_cancelled: CancelCheck,
) -> ProjectionTable:
    """As `lens.projection.project`, counted."""
    telemetry.VECTORS_PROJECTED.inc(len(vectors))
    return project(head, vectors, spec, targets, check_cancelled)
