"""What a Trace sends: its header, one graph a layer, its summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from januslens._notebook.traces import layer_html
from januslens._results.graph import GraphView, KnownNodes
from januslens._results.late import Late
from januslens._results.nodes import Edge, Node
from januslens._results.provenance import Guarantee, ModelSizes, Provenance, StageTime
from januslens._results.tokens import Token, TokenTable
from januslens.v1 import trace_pb2


@dataclass(frozen=True)
class PositionTarget:
    """The token whose rank every projection at a position reports, and the model's own choice.

    Attributes:
        position: The query position.
        target: The token asked for, or the model's own next token.
        predicted: The model's own next token.
        target_probability: What the model's output gives the target.
        target_rank: 0 = it is the model's own choice.
        target_logit: Its logit.
        constant_logit_contribution: What norm and head bias add to it, in logits; with every
            component's contribution it adds up to the target's logit before a soft cap.
    """

    position: int
    target: Token
    predicted: Token
    target_probability: float
    target_rank: int
    target_logit: float
    constant_logit_contribution: float

    @classmethod
    def from_message(cls, message: trace_pb2.PositionTarget, tokens: TokenTable) -> PositionTarget:
        """Read one target, its texts from `tokens`."""
        return cls(
            position=message.position,
            target=tokens[message.target_token_id],
            predicted=tokens[message.predicted_token_id],
            target_probability=message.target_probability,
            target_rank=message.target_rank,
            target_logit=message.target_logit,
            constant_logit_contribution=message.constant_logit_contribution,
        )


@dataclass(frozen=True)
class TraceHeader:
    """What is known once the forward pass has run; a Trace's first event.

    Attributes:
        request_id: What to quote when asking about this call.
        provenance: Which weights computed it, where and with what.
        sizes: The model's layers, heads, neurons and tokens.
        prompt_tokens: The tokens as the model read them.
        layers: The layers that will come.
        targets: One for every position asked for.
    """

    request_id: str
    provenance: Provenance
    sizes: ModelSizes
    prompt_tokens: tuple[Token, ...]
    layers: tuple[int, ...]
    targets: tuple[PositionTarget, ...]

    @classmethod
    def from_message(cls, message: trace_pb2.TraceHeader, tokens: TokenTable) -> TraceHeader:
        """Read the header."""
        return cls(
            request_id=message.request_id,
            provenance=Provenance.from_message(message.provenance),
            sizes=ModelSizes.from_message(message.sizes),
            prompt_tokens=tuple(Token.from_message(t) for t in message.prompt_tokens),
            layers=tuple(message.layers),
            targets=tuple(PositionTarget.from_message(t, tokens) for t in message.targets),
        )


@dataclass(frozen=True)
class TraceSummary:
    """A Trace's last event: without it the stream was cut.

    Attributes:
        nodes: How many nodes were sent.
        edges: How many edges were sent.
        times: Seconds by stage on the server.
        checks: What the model's self-check measured, where asked for.
        constant_logit_contribution: That of the last position's target.
    """

    nodes: int
    edges: int
    times: tuple[StageTime, ...]
    checks: tuple[Guarantee, ...]
    constant_logit_contribution: float | None

    @classmethod
    def from_message(cls, message: trace_pb2.TraceSummary) -> TraceSummary:
        """Read the summary."""
        has_constant = message.HasField("constant_logit_contribution")
        return cls(
            nodes=message.nodes,
            edges=message.edges,
            times=tuple(StageTime.from_message(t) for t in message.times),
            checks=tuple(Guarantee.from_message(g) for g in message.checks),
            constant_logit_contribution=message.constant_logit_contribution
            if has_constant
            else None,
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerGraph(GraphView):
    """The nodes and edges of one block."""

    layer: int

    def __repr__(self) -> str:
        """One line: it may hold thousands of nodes."""
        counts = f"{len(self.node_list)} nodes, {len(self.edge_list)} edges"
        return f"<LayerGraph of layer {self.layer}: {counts}>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return layer_html(self)

    @classmethod
    def from_message(
        cls, message: trace_pb2.LayerGraph, tokens: TokenTable, earlier: Sequence[LayerGraph]
    ) -> LayerGraph:
        """One whole layer, whose edges may come from nodes of `earlier` ones."""
        nodes = Late.of(message.nodes, lambda node: Node.from_message(node, tokens))
        return cls(
            layer=message.layer,
            node_list=nodes,
            edge_list=Late.of(message.edges, Edge.from_message),
            known_nodes=KnownNodes([*(layer.node_list for layer in earlier), nodes]),
        )
