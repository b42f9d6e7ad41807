"""Encode the events of a Trace as messages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np

from januslens.v1 import trace_pb2
from januslens_server.results import (
    LayerGraph,
    NodeColumn,
    PositionTarget,
    TraceEvent,
    TraceHeader,
    TraceSummary,
)
from januslens_server.rpc.encode.columns import Columns, Parts
from januslens_server.rpc.encode.messages import (
    Pieces,
    Reading,
    ReadToken,
    TokenTexts,
    guarantee_messages,
    level_messages,
    provenance_message,
    sizes_message,
    tensor_columns,
    time_messages,
    with_body,
)
from januslens_server.rpc.wire import serialized

# Nodes are encoded in groups of about this many bytes, which fit into a CPU's cache.
COLUMN_BYTES = 2**20

_COORDINATES = {
    "kind": NodeColumn.KIND,
    "layer": NodeColumn.LAYER,
    "position": NodeColumn.POSITION,
    "head": NodeColumn.HEAD,
    "source_position": NodeColumn.SOURCE_POSITION,
    "neuron": NodeColumn.NEURON,
    "expert": NodeColumn.EXPERT,
}


class TraceEncoder:
    """Encodes one stream; numbers its messages and sends the text of each token once."""

    def __init__(self, request_id: str, read_token: ReadToken) -> None:
        """`read_token` returns the token with a vocabulary id."""
        self._request_id = request_id
        self._texts = TokenTexts(read_token)
        self._sequence = itertools.count()

    def encode(self, event: TraceEvent) -> Iterator[bytes]:
        """Yield the messages of one event, in the order in which they must be sent."""
        if isinstance(event, TraceHeader):
            yield serialized(self._response(header=self._header(event)))
        elif isinstance(event, TraceSummary):
            yield serialized(self._response(summary=_summary(event)))
        else:
            for body in self._layer(event):
                yield with_body(self._response(), "layer", body)

    def _response(self, **event: Any) -> trace_pb2.TraceResponse:
        return trace_pb2.TraceResponse(sequence=next(self._sequence), **event)

    def _header(self, header: TraceHeader) -> trace_pb2.TraceHeader:
        return trace_pb2.TraceHeader(
            request_id=self._request_id,
            provenance=provenance_message(header.provenance),
            sizes=sizes_message(header.facts),
            prompt_tokens=self._texts.of_prompt(header.prompt_tokens),
            layers=header.layers,
            limited_layers=level_messages(header.limited_layers),
            targets=[_target(target) for target in header.targets],
            tokens=self._texts.texts(
                chain(
                    (
                        token_id
                        for target in header.targets
                        for token_id in (target.target_token_id, target.predicted_token_id)
                    ),
                    () if header.other is None else (header.other,),
                )
            ),
            other_token_id=header.other,
            selected_by=trace_pb2.SelectionCriterion.ValueType(header.selected_by),
        )

    def _layer(self, graph: LayerGraph) -> list[bytes]:
        """Encode a layer, nodes first, so that no edge is sent before its nodes."""
        pieces = Pieces(trace_pb2.LayerGraph(layer=graph.layer), self._texts)
        _add_nodes(graph, pieces)
        _add_edges(graph, pieces)
        return pieces.messages(trace_pb2.LayerGraph(last=graph.last))


def _add_nodes(graph: LayerGraph, pieces: Pieces) -> None:
    listed = graph.projections.top_ids.shape[1] + graph.projections.bottom_ids.shape[1]
    at_once = max(1, COLUMN_BYTES // _node_bytes(graph, listed))
    for start in range(0, len(graph.nodes), at_once):
        part = slice(start, start + at_once)
        read = {"projection": Reading(graph.projections, graph.rows[part])}
        if graph.gradients is not None:
            gradients = graph.gradients
            read["gradient"] = Reading(gradients.projections, gradients.rows[part])
        parts = Parts(trace_pb2.LayerGraph, "nodes", _nodes(graph, part, read))
        pieces.extend(parts, read.values())


def _nodes(graph: LayerGraph, part: slice, read: Mapping[str, Reading]) -> Columns:
    """Encode some nodes, with their projections by the name of the field."""
    ids = graph.nodes.ids[part]
    nodes = Columns(trace_pb2.Node, len(ids))
    nodes.texts("id", ids)
    for name, column in _COORDINATES.items():
        values = graph.nodes.column(column)[part]
        nodes.unsigned(name, values, values >= 0)
    nodes.floats("norm", graph.norms[part])
    numbers = {"activation": graph.activations[part]}
    if graph.gradients is not None:
        numbers["gradient_norm"] = graph.gradients.norms[part]
    for name, found in numbers.items():
        nodes.floats(name, found, ~np.isnan(found))
    for name, reading in read.items():
        reading.add_to(nodes, name)
    counts = graph.nodes.column(NodeColumn.MEMBERS)[part]
    if (counts >= 0).any():
        members = Columns(trace_pb2.Members, len(ids))
        members.unsigned("count", counts.clip(0))
        members.unsigned("digest", graph.nodes.column(NodeColumn.MEMBERS_DIGEST)[part].clip(0))
        nodes.delimited("members", members.cells(), counts >= 0)
    if graph.vectors is not None:
        nodes.delimited("vector", tensor_columns(graph.vectors[part]).cells())
    return nodes


def _node_bytes(graph: LayerGraph, listed: int) -> int:
    """Return about the bytes of a node."""
    width = 0 if graph.vectors is None else 4 * graph.vectors.shape[1]
    return 128 + 16 * listed + width


def _add_edges(graph: LayerGraph, pieces: Pieces) -> None:
    edges = graph.edges
    columns = Columns(trace_pb2.Edge, len(edges))
    columns.texts("source", edges.sources)
    columns.texts("target", edges.targets)
    columns.unsigned("kind", edges.kinds)
    for name, values in (
        ("weight", edges.weights),
        ("share", edges.shares),
        ("attention", edges.attention),
        ("logit_contribution", edges.logit_contributions),
        ("attribution", edges.attributions),
        ("overlap", edges.overlaps),
    ):
        columns.floats(name, values, ~np.isnan(values))
    pieces.extend(Parts(trace_pb2.LayerGraph, "edges", columns))


def _target(target: PositionTarget) -> trace_pb2.PositionTarget:
    return trace_pb2.PositionTarget(
        position=target.position,
        target_token_id=target.target_token_id,
        predicted_token_id=target.predicted_token_id,
        target_probability=target.target_probability,
        target_log_probability=target.target_log_probability,
        target_rank=target.target_rank,
        target_logit=target.target_logit,
        constant_logit_contribution=target.constant_logit_contribution,
        logit_difference=target.logit_difference,
    )


def _summary(summary: TraceSummary) -> trace_pb2.TraceSummary:
    return trace_pb2.TraceSummary(
        nodes=summary.nodes,
        edges=summary.edges,
        times=time_messages(summary.times),
        checks=guarantee_messages(summary.checks),
        constant_logit_contribution=summary.constant_logit_contribution,
    )
