"""Run the pipelines in this process, without a server, to measure the engine alone."""

from __future__ import annotations

from collections.abc import Sequence

from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.resolve import resolve_gradient_lens, resolve_trace
from januslens_server.pipelines.trace import trace
from januslens_server.results import GradientMatrix, LayerGraph
from januslens_server.specs import GradientLensSpec, NegativeLogLikelihood, TraceSpec


def run_trace(model: ResidentModel, spec: TraceSpec) -> list[LayerGraph]:
    """Run a Trace and return its layers."""
    return [
        event
        for event in trace(resolve_trace(model, spec), _go_on)
        if isinstance(event, LayerGraph)
    ]


def run_gradient(model: ResidentModel, ids: Sequence[int], target: int) -> list[GradientMatrix]:
    """Run a GradientLens of FF1 (gated: GATE and UP) and FF2 in all layers."""
    spec = GradientLensSpec(tuple(ids), NegativeLogLikelihood((target,)), components=0)
    events = gradient_lens(resolve_gradient_lens(model, spec), _go_on)
    return [event for event in events if isinstance(event, GradientMatrix)]


def projected_rows(layers: Sequence[LayerGraph]) -> int:
    """Return the number of vectors that a trace projected."""
    return sum(len(layer.projections.projected) for layer in layers)


def _go_on() -> None:
    """A cancellation check that never cancels."""
