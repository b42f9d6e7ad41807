"""Trace: the flow graph of one forward pass, layer by layer (VISIT; Katz & Belinkov, 2023)."""

from __future__ import annotations

from collections.abc import Iterator

from januslens_server.errors import CancelCheck
from januslens_server.models.runner import forward, prepared
from januslens_server.pipelines.checks import TraceChecks
from januslens_server.pipelines.flows import LayerFlows, position_targets
from januslens_server.pipelines.metrics import StageClock
from januslens_server.pipelines.readings import FlowReader
from januslens_server.pipelines.resolve import ResolvedTrace
from januslens_server.results import TraceEvent, TraceHeader, TraceSummary


def trace(request: ResolvedTrace, check_cancelled: CancelCheck) -> Iterator[TraceEvent]:
    """Yield the header, then each layer's graph as soon as it is projected, then the summary.

    `check_cancelled` is called before every block of the forward pass, before every layer, and
    before every chunk of vectors. What it raises ends the request.
    """
    clock = StageClock("Trace")
    clock.add("tokenize", request.seconds)
    model, spec, tokens = request.model, request.spec, request.tokens
    layers, positions = request.layers, request.positions
    with clock.stage("forward"):
        changes = prepared(model, request.interventions, len(tokens), check_cancelled)
        passed = forward(
            model,
            [token.id for token in tokens],
            layers,
            check_cancelled,
            positions,
            positions if spec.include_checks else positions[-1:],
            changes,
        )
        targets = position_targets(
            model, passed.residual, positions, request.target, check_cancelled
        )
    yield TraceHeader(model.provenance, model.view.facts, tokens, layers, targets)

    flows = LayerFlows(model, spec, passed)
    reader = FlowReader(model, spec, targets, check_cancelled)
    checks = TraceChecks(model, passed, targets, check_cancelled)
    nodes = edges = 0
    pieces = flows.pieces(layers, targets, clock)
    piece = next(pieces, None)
    while piece is not None:
        check_cancelled()
        with clock.stage("project"):
            graph = reader.read(piece)
        if spec.include_checks:
            with clock.stage("check"):
                checks.see(piece.flows)
        nodes, edges = nodes + len(graph.nodes), edges + len(graph.edges)
        # Build the next piece before this one is encoded, because both hold the interpreter's lock.
        piece = next(pieces, None)
        yield graph
    whole = spec.include_logit_contribution and len(layers) == model.view.facts.n_layers
    # The summary has a constant only if a single position is traced.
    single = spec.include_logit_contribution and len(targets) == 1
    yield TraceSummary(
        nodes=nodes,
        edges=edges,
        times=clock.times(),
        checks=checks.guarantees(whole) if spec.include_checks else (),
        constant_logit_contribution=targets[0].constant_logit_contribution if single else None,
    )
