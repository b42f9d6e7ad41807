"""Trace: the flow graph of one forward pass, layer by layer (VISIT; Katz & Belinkov, 2023)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from januslens_server.errors import CancelCheck
from januslens_server.models.runner import ForwardPass, differentiated, forward, prepared
from januslens_server.pipelines.checks import TraceChecks
from januslens_server.pipelines.flows import LayerFlows, position_targets
from januslens_server.pipelines.metrics import StageClock
from januslens_server.pipelines.readings import FlowReader
from januslens_server.pipelines.resolve import ResolvedTrace
from januslens_server.results import PositionTarget, TraceEvent, TraceHeader, TraceSummary


def trace(request: ResolvedTrace, check_cancelled: CancelCheck) -> Iterator[TraceEvent | None]:
    """Yield the header, then each layer's graph as soon as it is projected, then the summary.

    Layers with few nodes are projected together; None is yielded for each that is not projected
    yet. `check_cancelled` is called before every block of the forward pass, before every layer, and
    before every chunk of vectors. What it raises ends the request.
    """
    clock = StageClock("Trace")
    clock.add("tokenize", request.seconds)
    model, spec, tokens = request.model, request.spec, request.tokens
    layers = request.layers
    with clock.stage("backward" if spec.differentiates else "forward"):
        passed, targets = _passed(request, check_cancelled)
    yield TraceHeader(
        provenance=model.provenance,
        facts=model.view.facts,
        prompt_tokens=tokens,
        layers=layers,
        targets=targets,
        selected_by=spec.selection.by,
        other=request.other,
        limited_layers=model.view.limited(layers),
    )

    flows = LayerFlows(model, spec, passed, request.other)
    reader = FlowReader(model, spec, targets, check_cancelled)
    checks = TraceChecks(model, passed, targets, request.other, check_cancelled)
    nodes = edges = 0
    pieces = flows.pieces(layers, targets, clock)
    piece = next(pieces, None)
    while piece is not None:
        check_cancelled()
        with clock.stage("project"):
            reader.add(piece)
            read = reader.start() if reader.full else None
        if spec.include_checks:
            with clock.stage("check"):
                checks.see(piece.flow)
        # Build the next piece while a GPU projects this one. It comes before this one is encoded,
        # because both hold the interpreter's lock.
        piece = next(pieces, None)
        with clock.stage("project"):
            graphs = [] if read is None else read()
            if piece is None:
                graphs += reader.start()()
        nodes += sum(len(graph.nodes) for graph in graphs)
        edges += sum(len(graph.edges) for graph in graphs)
        if not graphs:
            yield None
        del read  # and the tensors of the graphs with it: a slow caller keeps memory otherwise
        while graphs:
            yield graphs.pop(0)
    whole = spec.contributes and len(layers) == model.view.facts.n_layers
    # The summary has a constant only if a single position is traced.
    single = spec.contributes and len(targets) == 1
    yield TraceSummary(
        nodes=nodes,
        edges=edges,
        times=clock.times(),
        checks=checks.guarantees(whole) if spec.include_checks else (),
        constant_logit_contribution=targets[0].constant_logit_contribution if single else None,
    )


def _passed(
    request: ResolvedTrace, check_cancelled: CancelCheck
) -> tuple[ForwardPass, list[PositionTarget]]:
    """Run the prompt, and if requested the backward pass; return the targets of all positions."""
    model, spec, positions = request.model, request.spec, request.positions
    ids = [token.id for token in request.tokens]
    scored = positions if spec.include_checks else positions[-1:]
    changes = prepared(model, request.interventions, len(ids), check_cancelled)
    targets: list[PositionTarget] = []

    def choose(residual: torch.Tensor) -> None:
        targets.extend(
            position_targets(
                model, residual, positions, request.targets, check_cancelled, request.other
            )
        )

    def score(residual: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the logit, or the logit difference, that attributions explain."""
        choose(residual)
        last = logits[-1]
        value = last[targets[-1].target_token_id]
        return value if request.other is None else value - last[request.other]

    if spec.differentiates:
        passed = differentiated(
            model, ids, request.layers, score, check_cancelled, positions, scored, changes
        )
    else:
        passed = forward(model, ids, request.layers, check_cancelled, positions, scored, changes)
        choose(passed.residual)
    return passed, targets
