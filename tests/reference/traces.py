"""Collect a trace from the server's pipeline and compare it with the expected graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.project import project_vectors
from januslens_server.pipelines.resolve import resolve_project, resolve_trace
from januslens_server.pipelines.trace import trace
from januslens_server.results import (
    Edge,
    Floats,
    LayerGraph,
    Node,
    ProjectionTable,
    TraceEvent,
    TraceHeader,
    TraceSummary,
)
from januslens_server.specs import ProjectSpec, TraceSpec
from tests.reference.graph import EdgeKey, ExpectedEdge, ExpectedGraph
from tests.reference.lens import largest


@dataclass(frozen=True)
class TracedNode:
    """A node with its own row of its message's table, None if it is not projected."""

    node: Node
    norm: float
    activation: float
    vector: Floats | None
    row: int | None


@dataclass(frozen=True)
class Traced:
    """All events of one stream, after checks of the stream's form."""

    events: Sequence[TraceEvent]

    @cached_property
    def header(self) -> TraceHeader:
        header = self.events[0]
        assert isinstance(header, TraceHeader)
        return header

    @cached_property
    def summary(self) -> TraceSummary:
        summary = self.events[-1]
        assert isinstance(summary, TraceSummary)
        return summary

    @cached_property
    def graphs(self) -> list[LayerGraph]:
        graphs = [event for event in self.events[1:-1] if isinstance(event, LayerGraph)]
        assert len(graphs) == len(self.events) - 2
        return graphs

    @cached_property
    def nodes(self) -> dict[str, TracedNode]:
        found: dict[str, TracedNode] = {}
        before = 0
        for graph in self.graphs:
            for i, node in enumerate(graph.nodes):
                assert node.id not in found, f"{node.id} was sent twice"
                found[node.id] = TracedNode(
                    node=node,
                    norm=float(graph.norms[i]),
                    activation=float(graph.activations[i]),
                    vector=None if graph.vectors is None else graph.vectors[i],
                    row=None if graph.rows[i] < 0 else before + int(graph.rows[i]),
                )
            before += len(graph.projections.projected)
        return found

    @cached_property
    def edges(self) -> dict[EdgeKey, Edge]:
        found: dict[EdgeKey, Edge] = {}
        for graph in self.graphs:
            for edge in graph.edges:
                key = edge.source, edge.target, edge.kind
                assert key not in found, f"{key} was sent twice"
                found[key] = edge
        return found

    @cached_property
    def table(self) -> ProjectionTable:
        """Return the projections of all messages as one table."""
        tables = [graph.projections for graph in self.graphs]
        columns = {
            name: np.concatenate([getattr(table, name) for table in tables])
            for name in vars(tables[0])
        }
        return ProjectionTable(**columns)

    def vector(self, node_id: str) -> Tensor:
        vector = self.nodes[node_id].vector
        assert vector is not None
        return torch.from_numpy(vector).double()


def run_trace(model: ResidentModel, spec: TraceSpec) -> Traced:
    events = trace(resolve_trace(model, spec), lambda: None)
    return Traced([event for event in events if event is not None])


def run_project(model: ResidentModel, spec: ProjectSpec) -> ProjectionTable:
    (table,) = project_vectors(resolve_project(model, spec), lambda: None)
    return table


@dataclass
class GraphErrors:
    """The largest differences.

    Those of vectors and contributions are relative to their size, those of shares and probabilities
    absolute, and those of weights and activations relative to at least 1.
    """

    vector: float = 0.0
    norm: float = 0.0
    activation: float = 0.0
    weight: float = 0.0
    share: float = 0.0
    attention: float = 0.0
    contribution: float = 0.0
    nodes: int = 0
    edges: int = 0

    def add(self, traced: Traced, expected: ExpectedGraph) -> None:
        """Compare; raises AssertionError if nodes or edges differ from the expected ones."""
        assert traced.nodes.keys() == expected.nodes.keys()
        assert traced.edges.keys() == expected.edges.keys()
        for node_id, wanted in expected.nodes.items():
            self._node(traced, node_id, wanted.vector, wanted.activation)
            zero = not bool(wanted.vector.any())
            assert (traced.nodes[node_id].row is None) == (zero or not wanted.projected)
        for key, edge in expected.edges.items():
            self._edge(traced.edges[key], edge)

    def _node(self, traced: Traced, node_id: str, vector: Tensor, activation: float | None) -> None:
        self.nodes += 1
        found, size = traced.nodes[node_id], float(vector.norm())
        self.norm = max(self.norm, abs(found.norm - size) / max(size, 1.0))
        if found.vector is not None:
            difference = (traced.vector(node_id) - vector).norm() / max(size, 1e-30)
            self.vector = max(self.vector, largest(difference[None]))
        assert (activation is None) == np.isnan(found.activation)
        if activation is not None:
            self.activation = max(self.activation, _relative(found.activation, activation))

    def _edge(self, found: Edge, wanted: ExpectedEdge) -> None:
        self.edges += 1
        self.weight = max(self.weight, _relative(found.weight, wanted.weight))
        self.share = max(self.share, _difference(found.share, wanted.share))
        self.attention = max(self.attention, _difference(found.attention, wanted.attention))
        if found.logit_contribution is not None:
            error = _difference(found.logit_contribution, wanted.logit_contribution)
            size = max(abs(wanted.logit_contribution or 0.0), 1.0)
            self.contribution = max(self.contribution, error / size)


def _relative(found: float, wanted: float) -> float:
    assert not np.isnan(found)
    return abs(found - wanted) / max(abs(wanted), 1.0)


def _difference(found: float | None, wanted: float | None) -> float:
    """Return the difference; 0 if both are absent. Either both are present or neither is."""
    if found is None or wanted is None:
        assert found is wanted
        return 0.0
    return abs(found - wanted)
