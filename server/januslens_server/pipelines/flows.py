"""Compute the targets of a forward pass and build its flow graphs, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from januslens_server.errors import CancelCheck
from januslens_server.graph.attention import IN_MIXER
from januslens_server.graph.block_flow import (
    block_flow,
    block_nodes,
    final_flow,
    stream_flow,
)
from januslens_server.graph.flow import Flow, FlowBuilder
from januslens_server.models.graph_inputs import block_weights, mixer_weights
from januslens_server.models.resident import ResidentModel
from januslens_server.models.runner import ForwardPass
from januslens_server.models.views import CoarseBlock
from januslens_server.pipelines.metrics import StageClock, read
from januslens_server.results import ModelFacts, PositionTarget
from januslens_server.specs import LensKind, LensSpec, TraceSpec
from januslens_server.transfer import to_device, to_host


@torch.inference_mode()
def position_targets(
    model: ResidentModel,
    residual: torch.Tensor,
    positions: Sequence[int],
    targets: Sequence[int | None],
    check_cancelled: CancelCheck,
    other: int | None = None,
) -> list[PositionTarget]:
    """Return the target of each position, from the last block's output `[pos, d_model]`.

    `targets` has one for each position; None means the model's own next token. `other` is the
    second token of a logit difference.
    """
    lens, rows = model.view.lens, residual[to_device(positions, residual.device)]
    own = np.array([target is None for target in targets])
    asked = None
    if not own.all():  # the rows of predictions are replaced below
        asked = to_device([[target or 0] for target in targets], rows.device)
    table = read(lens, rows, LensSpec(top_k=1, bottom_k=0), asked, check_cancelled)
    predicted, logits, probabilities = (
        found[:, 0] for found in (table.top_ids, table.top_logits, table.top_probabilities)
    )
    ids, ranks = predicted, np.zeros_like(predicted)
    if asked is not None:
        ids = np.where(own, ids, table.target_ids[:, 0])
        ranks = np.where(own, ranks, table.target_ranks[:, 0])
        logits = np.where(own, logits, table.target_logits[:, 0])
        probabilities = np.where(own, probabilities, table.target_probabilities[:, 0])
    constants = lens.attribution_constant(rows, to_device(ids.tolist(), rows.device))
    differences: list[float | None] = [None] * len(rows)
    if other is not None:
        others = rows.new_full((len(rows),), other, dtype=torch.long)
        constants = constants - lens.attribution_constant(rows, others)
        (compared,) = to_host(lens.cap(lens.target_logits(rows, others)))
        differences = (logits - compared.numpy()).tolist()
    constant_of = to_host(constants)[0].tolist()
    return [
        PositionTarget(
            position=position,
            target_token_id=int(ids[i]),
            predicted_token_id=int(predicted[i]),
            target_probability=float(probabilities[i]),
            target_rank=int(ranks[i]),
            target_logit=float(logits[i]),
            constant_logit_contribution=constant_of[i],
            logit_difference=differences[i],
            target_log_probability=float(logits[i] - table.log_normalizers[i]),
        )
        for i, position in enumerate(positions)
    ]


# Number of positions in a piece, whose vectors are in memory and projected at once. If few nodes
# are built at each position, a piece has more positions, until it has about `NODES_AT_ONCE` nodes,
# because projecting a few vectors takes as long as reading the unembedding from memory.
POSITIONS_AT_ONCE = 8
NODES_AT_ONCE = 512
# Pieces with fewer nodes are projected together with the pieces after them, for the same reason.
# From about this number on, the time of a product is proportional to its rows.
NODES_TOGETHER = 64


def positions_at_once(spec: TraceSpec, facts: ModelFacts, tokens: int) -> int:
    """Return the number of positions in a piece, given the length of the prompt."""
    counts = block_nodes(facts, spec.selection, tokens)
    shown = spec.node_kinds if spec.node_kinds and not spec.include_checks else counts.keys()
    nodes = sum(counts.get(kind, 0) for kind in shown)
    return max(POSITIONS_AT_ONCE, NODES_AT_ONCE // max(1, nodes))


@dataclass(frozen=True)
class Piece:
    """The graph of some positions of one layer; `last` marks the last piece of a layer."""

    layer: int
    flow: Flow
    lens: LensKind
    last: bool


class LayerFlows:
    """Builds the flow graphs of the requested layers and positions."""

    def __init__(
        self, model: ResidentModel, spec: TraceSpec, passed: ForwardPass, other: int | None
    ) -> None:
        """`passed` has the captured activations of the layers; `other` is that of the request."""
        self._model = model
        self._spec = spec
        self._passed = passed
        self._other = other

    def pieces(
        self, layers: Sequence[int], targets: Sequence[PositionTarget], clock: StageClock
    ) -> Iterator[Piece]:
        """Yield the pieces of the layers, lowest first, then the final norm and the prediction.

        The last two follow only if the model's last layer is requested. They are already normed,
        so they are projected with the RAW lens.
        """
        top = self._model.view.facts.n_layers - 1
        below: int | None = None
        facts, tokens = self._model.view.facts, len(self._passed.residual)
        at_once = positions_at_once(self._spec, facts, tokens)
        for layer in layers:
            for start in range(0, len(targets), at_once):
                chunk = targets[start : start + at_once]
                with clock.stage("graph"):
                    flow = self._block(layer, chunk, below)
                if chunk[-1] is targets[-1]:
                    self._passed.release(layer)
                last = layer != top and chunk[-1] is targets[-1]
                yield Piece(layer, flow, self._spec.lens.kind, last)
            below = layer
        if below == top:
            yield Piece(top, self._final(targets), LensKind.RAW, last=True)

    @torch.inference_mode()
    def _block(self, layer: int, targets: Sequence[PositionTarget], below: int | None) -> Flow:
        """Build one block at the position of each target; `below` is the layer sent before it."""
        stream = self._passed.stream(layer)
        blocks, directions = self._model.view.blocks, self._directions(targets)
        if directions is not None:
            later = prod(block.multiplier for block in blocks[layer + 1 :])
            directions = directions.to(stream.block_output.device) * later
        flow = FlowBuilder(
            layer,
            [target.position for target in targets],
            directions,
            () if self._spec.include_checks else self._spec.node_kinds,
            self._spec.keeps_vectors,
            self._spec.attributes,
        )
        block, selection = blocks[layer], self._spec.selection
        if isinstance(block, CoarseBlock):
            # The heads that a request names are those of attention.
            divided = flow.shows(*IN_MIXER) and not selection.named_heads
            mixer = mixer_weights(block) if divided else None
            return stream_flow(flow, stream, mixer, selection, below)
        weights, acts = block_weights(block), self._passed.layer(layer)
        return block_flow(flow, acts, weights, selection, below)

    @torch.inference_mode()
    def _final(self, targets: Sequence[PositionTarget]) -> Flow:
        """Build the final norm and the prediction at the position of each target."""
        before = self._at(targets).float()
        after = self._model.view.lens.normed(before)
        last_layer = self._model.view.facts.n_layers - 1
        return final_flow(last_layer, [target.position for target in targets], before, after)

    def _at(self, targets: Sequence[PositionTarget]) -> torch.Tensor:
        """Return the last block's output `[n, d_model]` at the targets' positions."""
        residual = self._passed.residual
        return residual[to_device([target.position for target in targets], residual.device)]

    def _directions(self, targets: Sequence[PositionTarget]) -> torch.Tensor | None:
        """Return the directions `[n, d_model]` of the targets' logit contributions, or None."""
        if not self._spec.contributes:
            return None
        residual = self._at(targets)
        tokens = to_device([target.target_token_id for target in targets], residual.device)
        lens = self._model.view.lens
        directions = lens.attribution(residual, tokens)
        if self._other is not None:
            directions = directions - lens.attribution(
                residual, torch.full_like(tokens, self._other)
            )
        return directions
