"""Compute the result of a layer from its flow graphs: norms, projections, overlaps of edges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    Edge,
    Gradients,
    LayerGraph,
    Node,
    NodeKind,
    PositionTarget,
    ProjectionTable,
)
from januslens_server.specs import LensKind, LensSpec, TraceSpec

# Kinds that edges of the next layer may refer to.
_RESIDUAL = frozenset({NodeKind.BLOCK_INPUT, NodeKind.BLOCK_OUTPUT})

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
        nodes = [node for flow in flows for node in flow.nodes]
        projected = [flag for flow in flows for flag in flow.projected]
        found = torch.cat([flow.norms for flow in flows] or [torch.empty(0)]).cpu().numpy()
        check_numbers("activations on this prompt", found)
        vectors = torch.empty(0, self._model.view.facts.d_model)
        if flows and self._spec.keeps_vectors:
            vectors = torch.cat([flow.vectors for flow in flows])
        vectors = vectors.to(self._model.device)
        shown = [i for i, node in enumerate(nodes) if self._shows(node.kind)]
        asked = [i for i in shown if projected[i]] if self._spec.include_projections else []
        table = _no_projections()
        if self._spec.include_projections:
            table = self._project(vectors[asked], [nodes[i] for i in asked], piece.lens)
        rows = np.full(len(nodes), -1, np.int64)
        kept = np.flatnonzero(table.projected)
        rows[np.array(asked, np.int64)[kept]] = kept
        sent = [nodes[i] for i in shown]
        tops = dict.fromkeys((node.id for node in sent), _NO_TOKENS)
        if self._spec.overlap_k:
            tops = {nodes[i].id: self._top(table, int(rows[i])) for i in shown}
        edges = self._edges((edge for flow in flows for edge in flow.edges), self._below | tops)
        self._below |= {node.id: tops[node.id] for node in sent if node.kind in _RESIDUAL}
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
            gradients=self._gradients(flows, shown) if self._spec.differentiates else None,
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

    def _shows(self, kind: NodeKind) -> bool:
        return not self._spec.node_kinds or kind in self._spec.node_kinds

    def _project(
        self, vectors: torch.Tensor, nodes: Sequence[Node], kind: LensKind
    ) -> ProjectionTable:
        lens = self._spec.lens
        widest = LensSpec(max(lens.top_k, self._spec.overlap_k), lens.bottom_k, kind)
        targets = [[self._targets[node.position]] for node in nodes]
        ids = torch.tensor(targets, dtype=torch.long, device=vectors.device).reshape(-1, 1)
        keys = [self._weight_row(node) for node in nodes]
        rows = self._model.rows
        before, found, missed = rows.computed, rows.found, rows.missed
        table = rows.project(vectors, keys, widest, ids, self._check_cancelled)
        telemetry.VECTORS_PROJECTED.inc(rows.computed - before)
        telemetry.ROW_CACHE_HITS.inc(rows.found - found)
        telemetry.ROW_CACHE_MISSES.inc(rows.missed - missed)
        return table

    def _weight_row(self, node: Node) -> tuple[int | None, ...] | None:
        """Return the cache key of a weight row; None for vectors that depend on the prompt."""
        if node.kind not in _WEIGHT_ROWS:
            return None
        # In a mixture, the experts' biases are multiplied by the router's weights.
        if node.kind is NodeKind.MLP_BIAS and self._model.view.facts.n_experts:
            return None
        return (node.kind, node.layer, node.expert, node.neuron)

    def _top(self, table: ProjectionTable, row: int) -> frozenset[int]:
        """Return the tokens that `overlap` compares; none for nodes without a projection."""
        if row < 0:
            return _NO_TOKENS
        return frozenset(table.top_ids[row, : self._spec.overlap_k].tolist())

    def _edges(self, edges: Iterable[Edge], tops: Mapping[str, frozenset[int]]) -> list[Edge]:
        """Return the edges between sent nodes, with VISIT's intersection score if requested."""
        visible = [edge for edge in edges if edge.source in tops and edge.target in tops]
        if not self._spec.overlap_k:
            return visible
        return [_overlapping(edge, tops[edge.source], tops[edge.target]) for edge in visible]


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
        target_ids=ids,
        target_ranks=ids,
        target_logits=numbers,
        target_probabilities=numbers,
    )


def _overlapping(edge: Edge, source: frozenset[int], target: frozenset[int]) -> Edge:
    if not source or not target:
        return edge
    return edge._replace(overlap=len(source & target) / len(source))


def _trimmed(table: ProjectionTable, top_k: int) -> ProjectionTable:
    return replace(
        table,
        top_ids=table.top_ids[:, :top_k],
        top_logits=table.top_logits[:, :top_k],
        top_probabilities=table.top_probabilities[:, :top_k],
    )
