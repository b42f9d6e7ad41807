"""Any request's demand."""

from __future__ import annotations

from januslens_server.pipelines.cost.demand import Demand
from januslens_server.pipelines.cost.gradients import gradient_lens_demand
from januslens_server.pipelines.cost.traced import trace_demand
from januslens_server.pipelines.cost.unary import (
    find_neurons_demand,
    preview_edit_demand,
    project_demand,
)
from januslens_server.pipelines.resolve import (
    Resolved,
    ResolvedFindNeurons,
    ResolvedGradientLens,
    ResolvedPreviewEdit,
    ResolvedProject,
    ResolvedTrace,
)


def demand_of(request: Resolved) -> Demand:
    """Estimate the device work of a resolved request."""
    match request:
        case ResolvedTrace():
            return trace_demand(request)
        case ResolvedGradientLens():
            return gradient_lens_demand(request)
        case ResolvedProject():
            return project_demand(request)
        case ResolvedPreviewEdit():
            return preview_edit_demand(request)
        case ResolvedFindNeurons():
            return find_neurons_demand(request)
