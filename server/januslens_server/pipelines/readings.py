"""Compute the results of layers from their flow graphs: norms, projections, overlaps of edges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np
import torch

from januslens_server import telemetry
from januslens_server.errors import CancelCheck
from januslens_server.graph.flow import Flow, Numbers
from januslens_server.lens.projection import PendingTable
from januslens_server.models.failures import check_numbers
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.flows import NODES_TOGETHER, Piece
from januslens_server.pipelines.metrics import start_reading
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
from januslens_server.transfer import HostCopy, to_device

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


@dataclass(frozen=True)
class _Unread:
    """The nodes of a piece that are sent, before anything is projected.

    `shown` are their indices among the nodes of the piece, whose `numbers` may still be on their
    way from the device. `vectors` `[m, d_model]` are those of the m nodes with the
    indices `asked`, which are projected. `gradients` `[s, d_model]` are those of the s nodes with
    the indices `states`, and `gradient_norms` `[s]` their norms.
    """

    layer: int
    last: bool
    lens: LensKind
    nodes: Nodes
    shown: Ints
    numbers: Callable[[], Numbers]
    asked: Ints
    vectors: torch.Tensor
    sent_vectors: HostCopy | None
    states: Ints
    gradients: torch.Tensor
    gradient_norms: HostCopy | None


class _Started(NamedTuple):
    """A projection of the vectors of several pieces, and the number of rows of each piece."""

    table: PendingTable
    counts: list[int]


class FlowReader:
    """Computes the results of one trace, layer by layer, lowest first.

    Projecting a few vectors takes as long as reading the unembedding from memory. So pieces with
    few nodes are collected, and their vectors are projected together.
    """

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
        self._collected: list[_Unread] = []

    def add(self, piece: Piece) -> None:
        """Collect a piece. Of its vectors, only those that are projected or sent are kept."""
        flow, nodes, device = piece.flow, piece.flow.nodes, self._model.device
        vectors = torch.empty(0, self._model.view.facts.stream_width, device=device)
        if nodes and self._spec.keeps_vectors:
            vectors = flow.vectors.to(device)
        shown = self._shown(nodes)
        asked = np.empty(0, np.int64)
        if self._spec.include_projections:
            asked = np.flatnonzero(flow.projected[shown])
        states, gradients = self._gradients(flow, shown.tolist())
        lengths = HostCopy(gradients.norm(dim=-1)) if self._spec.differentiates else None
        sent = HostCopy(_rows(vectors, shown)) if self._spec.include_vectors else None
        self._collected.append(
            _Unread(
                layer=piece.layer,
                last=piece.last,
                lens=piece.lens,
                nodes=nodes.rows(shown),
                shown=shown,
                numbers=flow.numbers,
                asked=asked,
                vectors=_rows(vectors, shown[asked]),
                sent_vectors=sent,
                states=states,
                gradients=gradients,
                gradient_norms=lengths,
            )
        )

    @property
    def full(self) -> bool:
        """Whether so many nodes are collected that more would not make each cheaper to project."""
        if not (self._spec.include_projections or self._spec.include_gradients):
            return True
        return sum(len(unread.nodes) for unread in self._collected) >= NODES_TOGETHER

    def start(self) -> Callable[[], list[LayerGraph]]:
        """Start to project the vectors of the collected pieces together.

        Returns a function that waits for their results; on a GPU, the caller can build the next
        piece before. Logits of weight rows are taken from the row cache if possible.
        `check_cancelled` is called before every chunk of rows that is computed.
        """
        collected, self._collected = self._collected, []
        tables = self._tables(collected)
        gradients = self._gradient_tables(collected)
        none = torch.empty(0)
        unread = [replace(each, vectors=none, gradients=none) for each in collected]

        def read() -> list[LayerGraph]:
            for each in unread:
                check_numbers("activations on this prompt", each.numbers().norms)
            columns = _tables_of(tables, len(unread)), _tables_of(gradients, len(unread))
            return [self._graph(*each) for each in zip(unread, *columns, strict=True)]

        return read

    def _graph(
        self, unread: _Unread, table: ProjectionTable, gradients: ProjectionTable
    ) -> LayerGraph:
        """Return the result of a piece, given the projections of its nodes and gradients."""
        rows = np.full(len(unread.nodes), -1, np.int64)
        kept = np.flatnonzero(table.projected)
        rows[unread.asked[kept]] = kept
        numbers = unread.numbers()
        edges = self._edges(numbers.edges, unread.nodes)
        if self._spec.overlap_k:
            edges = self._with_overlaps(edges, unread.nodes, table, rows)
        sent = None if unread.sent_vectors is None else unread.sent_vectors.tensors()[0].numpy()
        return LayerGraph(
            layer=unread.layer,
            nodes=unread.nodes,
            norms=numbers.norms[unread.shown],
            activations=numbers.activations[unread.shown],
            rows=rows,
            projections=_trimmed(table, self._spec.lens.top_k),
            edges=edges,
            last=unread.last,
            vectors=sent,
            gradients=_of_states(unread, gradients) if self._spec.differentiates else None,
        )

    def _gradients(self, flow: Flow, shown: Sequence[int]) -> tuple[Ints, torch.Tensor]:
        """Return the indices of the sent states `[s]`, and their gradients `[s, d_model]`."""
        found = dict(zip(flow.states, flow.gradients, strict=True))
        states = [(i, found[number]) for i, number in enumerate(shown) if number in found]
        if not states:
            empty = torch.empty(0, self._model.view.facts.stream_width, device=self._model.device)
            return np.empty(0, np.int64), empty
        gradients = torch.stack([gradient for _, gradient in states]).to(self._model.device)
        return np.array([i for i, _ in states]), gradients

    def _shown(self, nodes: Nodes) -> Ints:
        """Return the indices of the nodes to send."""
        if not self._spec.node_kinds:
            return np.arange(len(nodes))
        kinds = nodes.column(NodeColumn.KIND)
        return np.flatnonzero(np.isin(kinds, [int(kind) for kind in self._spec.node_kinds]))

    def _tables(self, collected: Sequence[_Unread]) -> list[_Started]:
        """Start to project the nodes of all pieces, together if lens and width are the same."""
        tables: list[_Started] = []
        if self._spec.include_projections:
            same = groupby(collected, key=lambda unread: (unread.lens, unread.vectors.shape[-1]))
            for (kind, _), pieces in same:
                group = list(pieces)
                vectors = torch.cat([unread.vectors for unread in group])
                nodes = Nodes.joined([unread.nodes.rows(unread.asked) for unread in group])
                counts = [len(unread.asked) for unread in group]
                tables.append(_Started(self._project(vectors, nodes, kind), counts))
        return tables

    def _gradient_tables(self, collected: Sequence[_Unread]) -> list[_Started]:
        """Start to project the gradients of all pieces, if the request asks for them."""
        counts = [len(unread.states) for unread in collected]
        if not (self._spec.include_gradients and any(counts)):
            return []
        whole = torch.cat([unread.gradients for unread in collected])
        vectors = self._model.view.lens.of_all_streams(whole)
        # A trace has the gradients of the logit at its last position only.
        last = self._targets[max(self._targets)]
        targets = vectors.new_full((len(vectors), 1), last, dtype=torch.long)
        head, lens = self._model.view.lens, self._spec.lens
        table = start_reading(head, vectors, lens, targets, self._check_cancelled)
        return [_Started(table, counts)]

    def _project(self, vectors: torch.Tensor, nodes: Nodes, kind: LensKind) -> PendingTable:
        lens = self._spec.lens
        widest = LensSpec(max(lens.top_k, self._spec.overlap_k), lens.bottom_k, kind)
        targets = [self._targets[at] for at in nodes.column(NodeColumn.POSITION).tolist()]
        ids = to_device(targets, vectors.device)[:, None]
        rows = self._model.rows
        before, found, missed = rows.computed, rows.found, rows.missed
        keys = self._weight_rows(nodes)
        table = rows.start_projection(vectors, keys, widest, ids, self._check_cancelled)
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


def _tables_of(started: Sequence[_Started], pieces: int) -> list[ProjectionTable]:
    """Wait for the tables of all pieces; they have no rows if nothing was projected."""
    tables = [own for table, counts in started for own in _split(table.table(), counts)]
    return tables or [_no_projections()] * pieces


def _rows(vectors: torch.Tensor, chosen: Ints) -> torch.Tensor:
    """Return the `chosen` rows, in ascending order; all of them without a copy."""
    if len(chosen) == len(vectors):
        return vectors
    return vectors[to_device(chosen, vectors.device)]


def _of_states(unread: _Unread, table: ProjectionTable) -> Gradients:
    """Return the gradients of a piece, given their projections."""
    norms = np.full(len(unread.nodes), np.nan, np.float32)
    if unread.gradient_norms is not None:
        norms[unread.states] = unread.gradient_norms.tensors()[0].numpy()
    rows = np.full(len(unread.nodes), -1, np.int64)
    kept = np.flatnonzero(table.projected)
    rows[unread.states[kept]] = kept
    return Gradients(norms, rows, table)


def _split(table: ProjectionTable, counts: Sequence[int]) -> list[ProjectionTable]:
    """Return consecutive parts of a table, with these numbers of rows."""
    starts = accumulate(counts, initial=0)
    return [table.rows(slice(start, start + n)) for start, n in zip(starts, counts, strict=False)]


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
