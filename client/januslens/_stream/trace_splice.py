"""A Trace that goes on at another replica."""

from __future__ import annotations

from typing import Any

from januslens._stream.splice import Splice, replace_all
from januslens.v1 import trace_pb2


class TraceSplice(Splice[trace_pb2.TraceRequest, trace_pb2.TraceResponse]):
    """Asks for the layers that are missing.

    A trace that begins above layer 0 brings the input of its first layer, which the cut one has as
    the output of the layer below: it is dropped. Where layers between were not asked for, the last
    one that came is asked for again and dropped, so that the GAP edge to it comes as it would have.
    """

    def __init__(self, request: trace_pb2.TraceRequest) -> None:
        super().__init__(request)
        self._layers: list[int] = []
        self._nodes: set[str] = set()
        self._edges = 0

    def rest(self) -> trace_pb2.TraceRequest:
        """The missing layers, on the same weights and for the same target."""
        request = self._again()
        if self._header is None:
            return request
        targets = set(self._targets(self._header))
        if not request.HasField("target") and len(targets) == 1:
            request.target.token_ids.ids.extend(targets)
        # What is checked on this very request is checked over all its layers.
        whole = request.include_checks or not self._layers
        replace_all(request.layers, list(self._header.layers) if whole else self._missing())
        return request

    def _missing(self) -> list[int]:
        below = self._layers[-1]
        missing = [layer for layer in self._header.layers if layer > below]
        return missing if missing and missing[0] == below + 1 else [below, *missing]

    def _take_part(self, response: trace_pb2.TraceResponse) -> list[trace_pb2.TraceResponse]:
        if response.layer.layer in self._layers:
            return []
        self._held.append(response)
        if not response.layer.last:
            return []
        whole, self._held = self._held, []
        self._layers.append(response.layer.layer)
        for piece in whole:
            self._join(piece.layer)
        return whole

    def _join(self, piece: trace_pb2.LayerGraph) -> None:
        replace_all(piece.nodes, [n for n in piece.nodes if n.id not in self._nodes])
        replace_all(piece.tokens, self._unnamed(piece.tokens))
        self._nodes.update(node.id for node in piece.nodes)
        self._edges += len(piece.edges)

    def _sum_up(self, response: trace_pb2.TraceResponse) -> trace_pb2.TraceResponse:
        response.summary.nodes, response.summary.edges = len(self._nodes), self._edges
        return response

    def _targets(self, header: Any) -> list[int]:
        return [target.target_token_id for target in header.targets]
