"""The flow graph of a whole forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from januslens._notebook.frame import PageFrame
from januslens._notebook.traces import trace_html
from januslens._results.graph import GraphView, KnownNodes, Part
from januslens._results.json_lines import json_lines
from januslens._results.kinds import NodeKind
from januslens._results.late import Late
from januslens._results.norms import NormEffect, norm_effects
from januslens._results.paths import strongest_path
from januslens._results.provenance import Provenance
from januslens._results.tokens import Token
from januslens._results.trace_events import LayerGraph, PositionTarget, TraceHeader, TraceSummary
from januslens.v1 import trace_pb2
from januslens.viewer.html import trace_page

# The finest parts that still partition the residual stream, each once.
_COMPONENTS = {
    NodeKind.BLOCK_INPUT,
    NodeKind.HEAD_OUTPUT,
    NodeKind.ATTENTION_BIAS,
    NodeKind.MLP_VALUE,
    NodeKind.MLP_BIAS,
}
_SUMS_OF_COMPONENTS = {NodeKind.ATTENTION_CONCAT, NodeKind.MLP_SUM, NodeKind.MLP_OUTPUT}


@dataclass(frozen=True, kw_only=True, repr=False)
class Trace(GraphView):
    """The flow graph of one forward pass (VISIT; Katz & Belinkov, 2023).

    Attributes:
        header: Prompt, targets and provenance.
        layers: The layers asked for, ascending.
        summary: Counts, times and checks; None if the stream was cut.
        responses: The messages that it was read from.
    """

    header: TraceHeader
    layers: tuple[LayerGraph, ...]
    summary: TraceSummary | None
    responses: tuple[trace_pb2.TraceResponse, ...] = field(repr=False, compare=False)

    @classmethod
    def from_parts(
        cls,
        header: TraceHeader,
        layers: Sequence[LayerGraph],
        summary: TraceSummary | None,
        responses: Sequence[trace_pb2.TraceResponse],
    ) -> Trace:
        """Put together what came one by one."""
        nodes = [layer.node_list for layer in layers]
        edges = [layer.edge_list for layer in layers]
        return cls(
            header=header,
            layers=tuple(layers),
            summary=summary,
            responses=tuple(responses),
            node_list=Late(sum(map(len, nodes)), lambda: chain.from_iterable(nodes)),
            edge_list=Late(sum(map(len, edges)), lambda: chain.from_iterable(edges)),
            known_nodes=KnownNodes(nodes),
        )

    @property
    def prompt_tokens(self) -> tuple[Token, ...]:
        """The prompt as the model read it."""
        return self.header.prompt_tokens

    @property
    def targets(self) -> tuple[PositionTarget, ...]:
        """One for every position asked for."""
        return self.header.targets

    @property
    def provenance(self) -> Provenance:
        """Which weights computed it, where and with what."""
        return self.header.provenance

    def layer(self, number: int) -> LayerGraph:
        """One layer.

        Raises:
            KeyError: It was not asked for.
        """
        for layer in self.layers:
            if layer.layer == number:
                return layer
        traced = ", ".join(str(layer.layer) for layer in self.layers)
        raise KeyError(f"expected one of the traced layers {traced}; got {number}")

    def target(self, position: int | None = None) -> PositionTarget:
        """The target at a position; by default at the last one traced.

        Raises:
            KeyError: The position was not asked for.
        """
        by_position = {target.position: target for target in self.targets}
        wanted = max(by_position) if position is None else position
        if wanted not in by_position:
            raise KeyError(f"expected one of the positions {sorted(by_position)}; got {position}")
        return by_position[wanted]

    def path_to_target(self, position: int | None = None) -> tuple[Part, ...]:
        """The strongest chain from the prediction back to the first block's input.

        See `januslens._results.paths`. Without the last layer it starts at the last one's output.

        Raises:
            KeyError: The position was not asked for, or no layer has come.
        """
        at = self.target(position).position
        ends = (NodeKind.PREDICTION, NodeKind.FINAL_NORM, NodeKind.BLOCK_OUTPUT)
        for kind in ends:
            if nodes := self.nodes_of(kind, at):
                return strongest_path(self, nodes[-1].id)
        raise KeyError(f"expected the trace to have an output at position {at}")

    def contributions(self, position: int | None = None) -> list[Part]:
        """The components by what each adds to the target's logit, largest first.

        Components are the embedding, heads, neurons, biases and the rest of each sum: every
        summand of the residual stream once. Over all layers they and the target's
        `constant_logit_contribution` add up to its logit.

        Raises:
            ValueError: The trace was made without logit contributions.
            KeyError: The position was not asked for.
        """
        at = self.target(position).position
        parts = list(self._components(at))
        if not parts:
            raise ValueError("no logit contributions here: trace with logit_contribution=True")
        return sorted(parts, key=lambda part: -(part.logit_contribution or 0.0))

    def _components(self, position: int) -> Iterator[Part]:
        for edge in self.edge_list:
            if edge.logit_contribution is None:
                continue
            source, target = self.node(edge.source), self.node(edge.target)
            rest = source.kind is NodeKind.OTHER and target.kind in _SUMS_OF_COMPONENTS
            if source.position == position and (source.kind in _COMPONENTS or rest):
                yield Part(source, edge)

    def norm_effects(self) -> list[NormEffect]:
        """What every norm removed and added among the top tokens."""
        return norm_effects(self)

    def __repr__(self) -> str:
        """One line: it may hold thousands of nodes."""
        prompt = "".join(token.text for token in self.prompt_tokens)
        positions = ", ".join(str(target.position) for target in self.targets)
        return (
            f"<Trace of {prompt!r} at {positions}: {len(self.layers)} layers, "
            f"{len(self.node_list)} nodes, {len(self.edge_list)} edges>"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return trace_html(self)

    def show(self, overview: Trace | None = None, *, height: int = 800) -> PageFrame:
        """The page of `to_html`, as the result of a notebook's cell; `height` in pixels."""
        return PageFrame(self.to_html(overview), height)

    def to_json_lines(self) -> Iterable[str]:
        """The stream as canonical protobuf JSON, one message a line: what `--json` prints."""
        return json_lines(self.responses)

    def to_html(self, overview: Trace | None = None) -> str:
        """This trace as a page: one HTML file that needs no network.

        Args:
            overview: What `client.trace_overview(trace)` gave: the residual stream at the other
                positions too. Without it the page shows the positions of this trace.
        """
        return trace_page(
            self.responses, overview.responses if overview else (), self.prompt_tokens
        )
