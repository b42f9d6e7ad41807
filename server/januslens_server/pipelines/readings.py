"""Compute the result of a layer from its flow graphs: norms, projections, overlaps of edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch

from januslens_server import telemetry
from januslens_server.errors import CancelCheck
from januslens_server.graph.flow import Flow
from januslens_server.models.failures import check_numbers
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.flows import Piece
from januslens_server.pipelines.metrics import read
from januslens_server.results import (
    Edges,
    Gradients,
    Ints,
    LayerGraph,
    NodeColumn,
    NodeKind,
    Nodes,
    PositionTarget,
    ProjectionTable,
)
from januslens_server.specs import LensKind, LensSpec, TraceSpec

# Kinds that edges of the next layer may refer to.
_RESIDUAL = [int(NodeKind.BLOCK_INPUT), int(NodeKind.BLOCK_OUTPUT)]

_NO_TOKENS = frozenset[int]()

_WEIGHT_ROWS = frozenset(
    {
        NodeKind.ATTENTION_NEURON,
        NodeKind.ATTENTION_BIAS,
        NodeKind.MLP_KEY,
        NodeKind.MLP_UP,
        NodeKind.MLP_VALUE,
        NodeKind.MLP_BIAS,
    }
)


class FlowReader:
    """Computes the results of one trace, layer by layer, lowest first."""

    def __init__(
        self,
        model: ResidentModel,
        spec: TraceSpec,
        targets: Sequence[PositionTarget],
        check_cancelled: CancelCheck,
    ) -> None:
        """Report the rank and probability of the target at each position."""
        self._check_cancelled = check_cancelled
        self._model = model
        self._spec = spec
        self._targets = {target.position: target.target_token_id for target in targets}
        self._below: dict[str, frozenset[int]] = {}

    def read(self, piece: Piece) -> LayerGraph:
        """Return the result of a piece; its vectors are projected together.

        Logits of weight rows are taken from the row cache if possible. `check_cancelled` is called
        before every chunk of rows that is computed.
        """
        flows = [flow for flow in piece.flows if flow.nodes]
        nodes = Nodes.joined([flow.nodes for flow in flows])
        found = torch.cat([flow.norms for flow in flows] or [torch.empty(0)]).cpu().numpy()
        check_numbers("activations on this prompt", found)
        vectors = torch.empty(0, self._model.view.facts.d_model)
        if flows and self._spec.keeps_vectors:
            vectors = torch.cat([flow.vectors for flow in flows])
        vectors = vectors.to(self._model.device)
        shown = self._shown(nodes)
        table, rows = _no_projections(), np.full(len(nodes), -1, np.int64)
        if self._spec.include_projections:
            projected = np.concatenate([np.empty(0, np.bool_), *(flow.projected for flow in flows)])
            asked = shown[projected[shown]]
            table = self._project(vectors[asked], nodes.rows(asked), piece.lens)
            kept = np.flatnonzero(table.projected)
            rows[asked[kept]] = kept
        sent = nodes.rows(shown)
        edges = self._edges(Edges.joined([flow.edges for flow in flows]), sent)
        if self._spec.overlap_k:
            edges = self._with_overlaps(edges, sent, table, rows[shown])
        activations = [flow.activations for flow in flows] or [np.empty(0, np.float32)]
        return LayerGraph(
            layer=piece.layer,
            nodes=sent,
            norms=found[shown],
            activations=np.concatenate(activations)[shown],
            rows=rows[shown],
            projections=_trimmed(table, self._spec.lens.top_k),
            edges=edges,
            last=piece.last,
            vectors=vectors[shown].cpu().numpy() if self._spec.include_vectors else None,
            gradients=self._gradients(flows, shown.tolist()) if self._spec.differentiates else None,
        )

    def _gradients(self, flows: Sequence[Flow], shown: Sequence[int]) -> Gradients:
        """Return the gradients of the sent states, projected if the request asks for it."""
        starts = accumulate((len(flow.nodes) for flow in flows), initial=0)
        found = {
            start + state: gradient
            for start, flow in zip(starts, flows, strict=False)
            for state, gradient in zip(flow.states, flow.gradients, strict=True)
        }
        states = [(i, found[number]) for i, number in enumerate(shown) if number in found]
        norms = np.full(len(shown), np.nan, np.float32)
        rows = np.full(len(shown), -1, np.int64)
        table = _no_projections()
        if states:
            at = [i for i, _ in states]
            vectors = torch.stack([gradient for _, gradient in states]).to(self._model.device)
            norms[at] = vectors.norm(dim=-1).cpu().numpy()
            if self._spec.include_gradients:
                lens = self._spec.lens
                # A trace has the gradients of the logit at its last position only.
                last = self._targets[max(self._targets)]
                targets = torch.full((len(vectors), 1), last, device=vectors.device)
                table = read(self._model.view.lens, vectors, lens, targets, self._check_cancelled)
                kept = np.flatnonzero(table.projected)
                rows[np.array(at)[kept]] = kept
        return Gradients(norms, rows, table)

    def _shown(self, nodes: Nodes) -> Ints:
        """Return the indices of the nodes to send."""
        if not self._spec.node_kinds:
            return np.arange(len(nodes))
        kinds = nodes.column(NodeColumn.KIND)
        return np.flatnonzero(np.isin(kinds, [int(kind) for kind in self._spec.node_kinds]))

    def _project(self, vectors: torch.Tensor, nodes: Nodes, kind: LensKind) -> ProjectionTable:
        lens = self._spec.lens
        widest = LensSpec(max(lens.top_k, self._spec.overlap_k), lens.bottom_k, kind)
        targets = [[self._targets[at]] for at in nodes.column(NodeColumn.POSITION).tolist()]
        ids = torch.tensor(targets, dtype=torch.long, device=vectors.device).reshape(-1, 1)
        rows = self._model.rows
        before, found, missed = rows.computed, rows.found, rows.missed
        keys = self._weight_rows(nodes)
        table = rows.project(vectors, keys, widest, ids, self._check_cancelled)
        telemetry.VECTORS_PROJECTED.inc(rows.computed - before)
        telemetry.ROW_CACHE_HITS.inc(rows.found - found)
        telemetry.ROW_CACHE_MISSES.inc(rows.missed - missed)
        return table

    def _weight_rows(self, nodes: Nodes) -> list[tuple[int, ...] | None]:
        """Return the cache keys of weight rows; None for vectors that depend on the prompt."""
        kinds = set(_WEIGHT_ROWS)
        # In a mixture, the experts' biases are multiplied by the router's weights.
        if self._model.view.facts.n_experts:
            kinds.discard(NodeKind.MLP_BIAS)
        columns = [NodeColumn.KIND, NodeColumn.LAYER, NodeColumn.EXPERT, NodeColumn.NEURON]
        keys = map(tuple, nodes.coordinates[:, columns].tolist())
        return [key if key[0] in kinds else None for key in keys]

    def _edges(self, edges: Edges, sent: Nodes) -> Edges:
        """Return the edges between sent nodes, and remember the ends of later edges."""
        known = self._below.keys() | sent.ids
        if not (known.issuperset(edges.sources) and known.issuperset(edges.targets)):
            ends = zip(edges.sources, edges.targets, strict=True)
            kept = [i for i, (source, target) in enumerate(ends) if {source, target} <= known]
            edges = edges.rows(np.array(kept, np.int64))
        for i in np.flatnonzero(np.isin(sent.column(NodeColumn.KIND), _RESIDUAL)).tolist():
            self._below[sent.ids[i]] = _NO_TOKENS
        return edges

    def _with_overlaps(
        self, edges: Edges, sent: Nodes, table: ProjectionTable, rows: Ints
    ) -> Edges:
        """Set VISIT's intersection score of edges whose ends are both projected."""
        tops = self._below | {
            node_id: frozenset(table.top_ids[row, : self._spec.overlap_k].tolist())
            if row >= 0
            else _NO_TOKENS
            for node_id, row in zip(sent.ids, rows.tolist(), strict=True)
        }
        self._below = {node_id: tops[node_id] for node_id in self._below}
        ends = zip(edges.sources, edges.targets, strict=True)
        pairs = ((tops[source], tops[target]) for source, target in ends)
        overlaps = [len(a & b) / len(a) if a and b else np.nan for a, b in pairs]
        return replace(edges, overlaps=np.array(overlaps, np.float64))


def _no_projections() -> ProjectionTable:
    """Return a table without rows."""
    ids, numbers = np.empty((0, 0), np.int64), np.empty((0, 0), np.float32)
    return ProjectionTable(
        projected=np.empty(0, np.bool_),
        top_ids=ids,
        top_logits=numbers,
        top_probabilities=numbers,
        bottom_ids=ids,
        bottom_logits=numbers,
        bottom_probabilities=numbers,
        entropy_bits=np.empty(0, np.float32),
        log_normalizers=np.empty(0, np.float32),
        target_ids=ids,
        target_ranks=ids,
        target_logits=numbers,
        target_probabilities=numbers,
    )


def _trimmed(table: ProjectionTable, top_k: int) -> ProjectionTable:
    return replace(
        table,
        top_ids=table.top_ids[:, :top_k],
        top_logits=table.top_logits[:, :top_k],
        top_probabilities=table.top_probabilities[:, :top_k],
    )
