"""Nodes and edges of the flow graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import Message

from januslens._results.kinds import EDGE_KINDS, NODE_KINDS, EdgeKind, NodeKind
from januslens._results.tokens import TokenTable
from januslens._results.vectors import Projection, Tensor
from januslens.v1 import trace_pb2

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class Node:
    """One vector of the forward pass and its projection (VISIT, section 3).

    Attributes:
        id: The coordinates, e.g. `L3/p7/MEMORY_VALUE/h2/s4`; the same in every request.
        kind: Kind of the vector.
        layer: Layer, from 0; None outside the blocks.
        position: The query position.
        head: Query head; None for kinds that are not of one head.
        source_position: Source position of a memory key or value.
        neuron: Neuron of the MLP, or row of W_O.
        expert: Expert of the neuron, in a mixture of experts.
        norm: Euclidean norm of the vector.
        activation: Factor of the vector in its sum; set for neurons.
        projection: Projection of the vector; None for exact zeros and ATTENTION_CONCAT.
        vector: The vector `[d_model]`, if requested.
    """

    id: str
    kind: NodeKind
    layer: int | None
    position: int | None
    head: int | None
    source_position: int | None
    neuron: int | None
    expert: int | None
    norm: float
    activation: float | None
    projection: Projection | None
    vector: Tensor | None

    @classmethod
    def from_message(cls, message: trace_pb2.Node, tokens: TokenTable) -> Node:
        """Read one node, the texts of its projection from `tokens`."""
        has = message.HasField
        return cls(
            id=message.id,
            kind=NODE_KINDS.member(message.kind),
            layer=_given(message, "layer", message.layer),
            position=_given(message, "position", message.position),
            head=_given(message, "head", message.head),
            source_position=_given(message, "source_position", message.source_position),
            neuron=_given(message, "neuron", message.neuron),
            expert=_given(message, "expert", message.expert),
            norm=message.norm,
            activation=_given(message, "activation", message.activation),
            projection=Projection.from_message(message.projection, tokens)
            if has("projection")
            else None,
            vector=Tensor.from_message(message.vector) if has("vector") else None,
        )

    def __str__(self) -> str:
        """Its id and its top tokens."""
        return f"{self.id}: {self.projection}" if self.projection else self.id


@dataclass(frozen=True, slots=True)
class Edge:
    """A directed edge between two nodes; docs/semantics.md defines the weight of each kind.

    Attributes:
        source: Id of the source node.
        target: Id of the target node.
        kind: PART if the source is a part of a sum; otherwise how the target follows from it.
        weight: A norm, an attention probability or an activation, in the model's own units.
        share: `<part, sum> / ||sum||^2`, signed; the shares of one sum add up to 1.
        attention: The attention probability of a memory value.
        logit_contribution: Direct effect of the part on the target's logit, if requested.
        overlap: Fraction of top tokens that both ends share (VISIT's intersection score).
    """

    source: str
    target: str
    kind: EdgeKind
    weight: float
    share: float | None
    attention: float | None
    logit_contribution: float | None
    overlap: float | None

    @classmethod
    def from_message(cls, message: trace_pb2.Edge) -> Edge:
        """Read one edge."""
        return cls(
            source=message.source,
            target=message.target,
            kind=EDGE_KINDS.member(message.kind),
            weight=message.weight,
            share=_given(message, "share", message.share),
            attention=_given(message, "attention", message.attention),
            logit_contribution=_given(message, "logit_contribution", message.logit_contribution),
            overlap=_given(message, "overlap", message.overlap),
        )


def _given(message: Message, field: str, value: ValueT) -> ValueT | None:
    """`value` where the field is set: a zero that was sent is not an absent one."""
    return value if message.HasField(field) else None
