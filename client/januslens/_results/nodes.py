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
    """One vector of the forward pass, read in the vocabulary (VISIT, section 3).

    Attributes:
        id: Its coordinates, e.g. `L3/p7/MEMORY_VALUE/h2/s4`: equal in every request.
        kind: Which vector it is.
        layer: Its block; None outside the blocks.
        position: The query position.
        head: Its attention head.
        source_position: The position that a memory key or value comes from.
        neuron: The MLP's neuron, or the row of W_O.
        expert: The expert that the neuron belongs to.
        norm: Euclidean length of the vector.
        activation: What multiplies the vector in its sum.
        projection: The vector in the vocabulary; None if it is exactly zero or a junction.
        vector: The vector itself `[d_model]`, where asked for.
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
    """How one node enters another; docs/semantics.md says what each kind's weight is.

    Attributes:
        source: Id of the node it comes from.
        target: Id of the node it goes to.
        kind: PART for a summand, or how the one vector is made from the other.
        weight: In model units: the part's norm, an attention probability or an activation.
        share: `<part, sum> / ||sum||^2`, signed; the shares into a sum add to 1.
        attention: The attention probability of a memory value.
        logit_contribution: What the part adds to the target's logit, where asked for.
        overlap: Common part of both ends' top tokens (VISIT's intersection score).
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
