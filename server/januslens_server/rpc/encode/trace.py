"""Encode the events of a Trace as messages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from itertools import chain

from januslens.v1 import lens_pb2, trace_pb2
from januslens_server.results import (
    Gradients,
    LayerGraph,
    PositionTarget,
    TraceEvent,
    TraceHeader,
    TraceSummary,
)
from januslens_server.rpc.encode.messages import (
    Pieces,
    ReadToken,
    TokenTexts,
    guarantee_messages,
    named_tokens,
    projections,
    provenance_message,
    sizes_message,
    tensor_message,
    time_messages,
)


class TraceEncoder:
    """Encodes one stream; numbers its messages and sends the text of each token once."""

    def __init__(self, request_id: str, read_token: ReadToken) -> None:
        """`read_token` returns the token with a vocabulary id."""
        self._request_id = request_id
        self._texts = TokenTexts(read_token)
        self._sequence = itertools.count()

    def encode(self, event: TraceEvent) -> Iterator[trace_pb2.TraceResponse]:
        """Yield the messages of one event, in the order in which they must be sent."""
        if isinstance(event, TraceHeader):
            yield trace_pb2.TraceResponse(sequence=next(self._sequence), header=self._header(event))
        elif isinstance(event, TraceSummary):
            yield trace_pb2.TraceResponse(sequence=next(self._sequence), summary=_summary(event))
        else:
            yield from self._layer(event)

    def _header(self, header: TraceHeader) -> trace_pb2.TraceHeader:
        return trace_pb2.TraceHeader(
            request_id=self._request_id,
            provenance=provenance_message(header.provenance),
            sizes=sizes_message(header.facts),
            prompt_tokens=self._texts.of_prompt(header.prompt_tokens),
            layers=header.layers,
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

    def _layer(self, graph: LayerGraph) -> list[trace_pb2.TraceResponse]:
        """Encode a layer, nodes first, so that no edge is sent before its nodes."""
        responses: list[trace_pb2.TraceResponse] = []

        def new() -> trace_pb2.LayerGraph:
            response = trace_pb2.TraceResponse(sequence=next(self._sequence))
            responses.append(response)
            response.layer.layer = graph.layer
            return response.layer

        pieces = Pieces(new, self._texts)
        _add_nodes(graph, pieces)
        _add_edges(graph, pieces)
        responses[-1].layer.last = graph.last
        return responses


def _add_nodes(graph: LayerGraph, pieces: Pieces[trace_pb2.LayerGraph]) -> None:
    read, named = projections(graph.projections), named_tokens(graph.projections)
    gradients = None if graph.gradients is None else _StateGradients(graph.gradients)
    columns = zip(
        graph.nodes,
        graph.norms.tolist(),
        graph.activations.tolist(),
        graph.rows.tolist(),
        strict=True,
    )
    for i, (node, norm, activation, row) in enumerate(columns):
        added = pieces.body().nodes.add(
            id=node.id,
            kind=trace_pb2.NodeKind.ValueType(node.kind),
            layer=node.layer,
            position=node.position,
            head=node.head,
            source_position=node.source_position,
            neuron=node.neuron,
            expert=node.expert,
            norm=norm,
            activation=None if math.isnan(activation) else activation,
            projection=None if row < 0 else read[row],
            vector=None if graph.vectors is None else tensor_message(graph.vectors[i]),
        )
        tokens = () if row < 0 else named[row]
        if gradients is not None:
            tokens = [*tokens, *gradients.add(i, added)]
        pieces.added(added, tokens)


class _StateGradients:
    """Adds the gradients of a layer's states to their messages."""

    def __init__(self, gradients: Gradients) -> None:
        self._norms, self._rows = gradients.norms.tolist(), gradients.rows.tolist()
        self._read = projections(gradients.projections)
        self._named = named_tokens(gradients.projections)

    def add(self, i: int, message: trace_pb2.Node) -> list[int]:
        """Set the gradient of node `i`; return the tokens that its projection names."""
        norm, row = self._norms[i], self._rows[i]
        if not math.isnan(norm):
            message.gradient_norm = norm
        if row < 0:
            return []
        message.gradient.MergeFrom(lens_pb2.Projection(**self._read[row]))
        return self._named[row]


def _add_edges(graph: LayerGraph, pieces: Pieces[trace_pb2.LayerGraph]) -> None:
    for edge in graph.edges:
        added = pieces.body().edges.add(
            source=edge.source,
            target=edge.target,
            kind=trace_pb2.EdgeKind.ValueType(edge.kind),
            weight=edge.weight,
            share=edge.share,
            attention=edge.attention,
            logit_contribution=edge.logit_contribution,
            attribution=edge.attribution,
            overlap=edge.overlap,
        )
        pieces.added(added)


def _target(target: PositionTarget) -> trace_pb2.PositionTarget:
    return trace_pb2.PositionTarget(
        position=target.position,
        target_token_id=target.target_token_id,
        predicted_token_id=target.predicted_token_id,
        target_probability=target.target_probability,
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
