"""Any request's demand."""

from __future__ import annotations

from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.cost.demand import Demand
from januslens_server.pipelines.cost.gradients import gradient_lens_demand
from januslens_server.pipelines.cost.traced import trace_demand
from januslens_server.pipelines.cost.unary import (
    find_neurons_demand,
    preview_edit_demand,
    project_demand,
)
from januslens_server.specs import (
    FindNeuronsSpec,
    GradientLensSpec,
    PreviewEditSpec,
    ProjectSpec,
    TraceSpec,
)

Spec = TraceSpec | GradientLensSpec | ProjectSpec | PreviewEditSpec | FindNeuronsSpec


def demand_of(model: ResidentModel, spec: Spec) -> Demand:
    """Raises `InvalidRequest` for prompts, targets, layers and positions the model cannot take."""
    match spec:
        case TraceSpec():
            return trace_demand(model, spec)
        case GradientLensSpec():
            return gradient_lens_demand(model, spec)
        case ProjectSpec():
            return project_demand(model, spec)
        case PreviewEditSpec():
            return preview_edit_demand(model, spec)
        case FindNeuronsSpec():
            return find_neurons_demand(model, spec)
