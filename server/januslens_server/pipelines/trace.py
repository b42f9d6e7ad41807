"""Trace: the flow graph of one forward pass, layer by layer (VISIT, Katz & Belinkov 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from januslens_server.capture.hooks import Checkpoint
from januslens_server.graph.block_flow import block_flow
from januslens_server.graph.final_flow import final_flow
from januslens_server.graph.flow import Flow
from januslens_server.lens.projection import project
from januslens_server.models.resident import ResidentModel
from januslens_server.models.runner import ForwardPass, forward
from januslens_server.models.weights import block_weights
from januslens_server.pipelines.clock import StageClock
from januslens_server.pipelines.inputs import (
    read_layers,
    read_positions,
    read_prompt,
    read_single_target,
)
from januslens_server.pipelines.readings import FlowReader
from januslens_server.results import (
    LayerGraph,
    PositionTarget,
    TraceEvent,
    TraceHeader,
    TraceSummary,
)
from januslens_server.specs import LensKind, LensSpec, TraceSpec

# Positions whose vectors are held and projected at once; more of them follow in further messages.
POSITIONS_AT_ONCE = 8


def trace(model: ResidentModel, spec: TraceSpec, checkpoint: Checkpoint) -> Iterator[TraceEvent]:
    """Yield the header, then each layer's graph as soon as it is projected, then the summary.

    Raises `InvalidRequest` for inputs that this model cannot take, before anything is computed,
    and whatever `checkpoint` raises, before every block of the forward pass and every layer.
    """
    clock = StageClock()
    with clock.stage("tokenize"):
        tokens = read_prompt(model, spec.prompt)
        layers = read_layers(model, spec.layers)
        positions = read_positions(spec.positions, spec.all_positions, len(tokens))
        target = None
        if spec.target is not None:
            target = read_single_target(model, spec.target, "target")
    with clock.stage("forward"):
        passed = forward(model, [token.id for token in tokens], layers, checkpoint)
        targets = _targets(model, passed.residual, positions, target)
    yield TraceHeader(model.provenance, tokens, layers, targets)

    nodes = edges = 0
    for graph in _layers(model, spec, passed, layers, targets, checkpoint, clock):
        nodes, edges = nodes + len(graph.nodes), edges + len(graph.edges)
        yield graph
    # The contract's summary has one constant: it belongs to the position if there is only one.
    constant = targets[0].constant_logit_contribution
    single = len(targets) == 1 and spec.include_logit_contribution
    yield TraceSummary(
        nodes, edges, clock.times(), constant_logit_contribution=constant if single else None
    )


def _layers(
    model: ResidentModel,
    spec: TraceSpec,
    passed: ForwardPass,
    layers: Sequence[int],
    targets: Sequence[PositionTarget],
    checkpoint: Checkpoint,
    clock: StageClock,
) -> Iterator[LayerGraph]:
    """The asked-for layers upwards, the final norm and prediction after the model's last."""
    reader = FlowReader(
        model.view.lens, spec, {target.position: target.target_token_id for target in targets}
    )
    top = model.view.facts.n_layers - 1
    below: int | None = None
    for layer in layers:
        for chunk in _chunks(targets):
            checkpoint()
            with clock.stage("graph"):
                flows = _block_flows(model, spec, passed, layer, chunk, below)
            with clock.stage("project"):
                last = layer != top and chunk[-1] is targets[-1]
                graph = reader.read(layer, flows, kind=spec.lens.kind, last=last)
            yield graph
        below = layer
    if below == top:
        with clock.stage("project"):
            flows = _final_flows(model, passed.residual, targets)
            graph = reader.read(top, flows, kind=LensKind.RAW, last=True)
        yield graph


def _chunks(targets: Sequence[PositionTarget]) -> Iterator[Sequence[PositionTarget]]:
    for start in range(0, len(targets), POSITIONS_AT_ONCE):
        yield targets[start : start + POSITIONS_AT_ONCE]


@torch.inference_mode()
def _block_flows(
    model: ResidentModel,
    spec: TraceSpec,
    passed: ForwardPass,
    layer: int,
    targets: Sequence[PositionTarget],
    below: int | None,
) -> list[Flow]:
    weights = block_weights(model.view.blocks[layer])
    directions: Sequence[torch.Tensor | None] = [None] * len(targets)
    if spec.include_logit_contribution:
        at = [target.position for target in targets]
        tokens = torch.tensor([target.target_token_id for target in targets], device=model.device)
        directions = model.view.lens.attribution(passed.residual[at], tokens).unbind()
    return [
        block_flow(
            layer,
            target.position,
            passed.layers[layer],
            weights,
            spec.selection,
            direction,
            below,
        )
        for target, direction in zip(targets, directions, strict=True)
    ]


@torch.inference_mode()
def _final_flows(
    model: ResidentModel, residual: torch.Tensor, targets: Sequence[PositionTarget]
) -> list[Flow]:
    last_layer = model.view.facts.n_layers - 1
    before = residual[[target.position for target in targets]].float()
    after = model.view.lens.final_norm(before)
    return [
        final_flow(last_layer, target.position, before[i], after[i])
        for i, target in enumerate(targets)
    ]


@torch.inference_mode()
def _targets(
    model: ResidentModel, residual: torch.Tensor, positions: Sequence[int], target: int | None
) -> list[PositionTarget]:
    """The model's prediction at each position and the token to report; default the prediction."""
    lens, rows = model.view.lens, residual[list(positions)]
    best = LensSpec(top_k=1, bottom_k=0)
    predicted = project(lens, rows, best).top_ids[:, 0]
    ids = [p if target is None else target for p in predicted.tolist()]
    chosen = torch.tensor(ids, device=rows.device)
    table = project(lens, rows, best, chosen[:, None])
    constants = lens.attribution_constant(chosen).tolist()
    return [
        PositionTarget(
            position=position,
            target_token_id=ids[i],
            predicted_token_id=int(predicted[i]),
            target_probability=float(table.target_probabilities[i, 0]),
            target_rank=int(table.target_ranks[i, 0]),
            target_logit=float(table.target_logits[i, 0]),
            constant_logit_contribution=constants[i],
        )
        for i, position in enumerate(positions)
    ]
