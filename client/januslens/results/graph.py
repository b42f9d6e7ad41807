"""Nodes and edges of the flow graph, and queries on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import Message

from januslens.results import exports
from januslens.results.kinds import EDGE_KINDS, NODE_KINDS, EdgeKind, NodeKind
from januslens.results.tokens import Token, TokenTable
from januslens.results.vectors import Projection, Tensor
from januslens.v1 import trace_pb2

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd


ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class Members:
    """The parts that an OTHER node sums.

    Attributes:
        count: Number of parts.
        digest: Equal for nodes with the same id if and only if they sum the same parts.
    """

    count: int
    digest: int


@dataclass(frozen=True, slots=True)
class Node:
    """One vector of the forward pass and its projection (VISIT, section 3).

    Attributes:
        id: The coordinates, e.g. `L3/p7/MEMORY_VALUE/h2/s4`; the same in every request.
        kind: Kind of the vector.
        layer: Layer, from 0; None outside the blocks.
        position: The query position.
        head: Query head; None for kinds that do not belong to a head.
        source_position: Source position of a memory key or value.
        neuron: Neuron of the MLP, or row of W_O.
        expert: Expert of the neuron, in a mixture of experts.
        norm: Euclidean norm of the vector.
        activation: The neuron's activation, which multiplies the vector in its sum; None for
            other kinds.
        projection: Projection of the vector; None for zero vectors and ATTENTION_CONCAT.
        vector: The vector `[d_model]`, if requested.
        gradient_norm: Norm of the gradient of the target's logit with respect to this vector; set
            for the residual stream and for what attention and MLP add to it, if requested.
        gradient: Projection of that gradient, if requested.
        members: The parts that an OTHER node sums, if they are known.
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
    gradient_norm: float | None = None
    gradient: Projection | None = None
    members: Members | None = None

    @classmethod
    def from_message(cls, message: trace_pb2.Node, tokens: TokenTable) -> Node:
        """Read one node; `tokens` has the texts of its projection."""
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
            gradient_norm=_given(message, "gradient_norm", message.gradient_norm),
            gradient=Projection.from_message(message.gradient, tokens) if has("gradient") else None,
            members=Members(message.members.count, message.members.digest)
            if has("members")
            else None,
        )

    def __str__(self) -> str:
        """The node's id and its top tokens."""
        return f"{self.id}: {self.projection}" if self.projection else self.id


@dataclass(frozen=True, slots=True)
class Edge:
    """A directed edge between two nodes; docs/semantics.md defines the weight of each kind.

    Attributes:
        source: Id of the source node.
        target: Id of the target node.
        kind: PART if the source is a summand of the target; docs/semantics.md has the other kinds.
        weight: A norm, an attention probability or an activation, in the model's own units.
        share: `<part, sum> / ||sum||^2`, signed; the shares of one sum add up to 1.
        attention: The attention probability of a memory value.
        logit_contribution: Direct effect of the part on the target's logit, if requested.
        overlap: Fraction of top tokens that source and target share (VISIT's intersection score).
        attribution: First-order effect of the part on the target's logit through all paths, if
            requested: the derivative of the logit when only this part is scaled.
    """

    source: str
    target: str
    kind: EdgeKind
    weight: float
    share: float | None
    attention: float | None
    logit_contribution: float | None
    overlap: float | None
    attribution: float | None = None

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
            attribution=_given(message, "attribution", message.attribution),
        )


def _given(message: Message, field: str, value: ValueT) -> ValueT | None:
    """Return `value` if the field is set, else None; a zero may have been sent."""
    return value if message.HasField(field) else None


@dataclass(frozen=True, slots=True)
class Part:
    """A node and its edge to another node; None if the edge is unknown."""

    node: Node
    edge: Edge | None

    @property
    def share(self) -> float | None:
        """`<part, sum> / ||sum||^2`, signed."""
        return self.edge.share if self.edge else None

    @property
    def logit_contribution(self) -> float | None:
        """Direct effect of the part on the target's logit, if requested."""
        return self.edge.logit_contribution if self.edge else None

    @property
    def attribution(self) -> float | None:
        """First-order effect of the part on the target's logit on all paths, if requested."""
        return self.edge.attribution if self.edge else None

    @property
    def attention(self) -> float | None:
        """The attention probability of a memory value."""
        return self.edge.attention if self.edge else None

    @property
    def weight(self) -> float | None:
        """Norm of the part, including its coefficient."""
        return self.edge.weight if self.edge else None


class Parts(list[Part]):
    """Parts of sums, in the order of the method that returned them."""

    def __init__(self, parts: Iterable[Part], prompt: Sequence[Token]) -> None:
        """`prompt` has the tokens of the sources."""
        super().__init__(parts)
        self._prompt = prompt

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with one row per part, indexed by id. Requires pandas.

        It has the columns of `trace.nodes` and `sum`, the id of the sum.
        """
        return exports.part_frame(self, self._prompt)


class KnownNodes(Mapping[str, Node]):
    """Nodes of several layers by id; later layers are searched first and parsed when needed."""

    def __init__(self, layers: Iterable[Sequence[Node]]) -> None:
        """`layers` has the nodes of each layer, lowest layer first."""
        self._layers = tuple(layers)[::-1]
        self._read: dict[int, dict[str, Node]] = {}

    def __getitem__(self, node_id: str) -> Node:
        """The node of this id."""
        for nodes in self._by_layer():
            if node_id in nodes:
                return nodes[node_id]
        raise KeyError(node_id)

    def __iter__(self) -> Iterator[str]:
        """All ids."""
        return (node.id for nodes in reversed(self._layers) for node in nodes)

    def __len__(self) -> int:
        """Number of nodes."""
        return sum(map(len, self._layers))

    def _by_layer(self) -> Iterator[dict[str, Node]]:
        for number, nodes in enumerate(self._layers):
            if number not in self._read:
                self._read[number] = {node.id: node for node in nodes}
            yield self._read[number]


@dataclass(frozen=True, kw_only=True)
class GraphView:
    """Nodes and edges, with queries on them.

    `nodes` and `edges` are pandas frames of `node_list` and `edge_list`.

    Attributes:
        node_list: All nodes in the order of the stream, parsed on first access.
        edge_list: All edges in the order of the stream, parsed on first access.
        known_nodes: The nodes by id, including nodes of earlier layers that edges refer to.
        prompt: The tokens of the prompt.
    """

    node_list: Sequence[Node] = field(repr=False)
    edge_list: Sequence[Edge] = field(repr=False)
    known_nodes: Mapping[str, Node] = field(repr=False, compare=False)
    prompt: Sequence[Token] = field(default=(), repr=False, compare=False)

    @cached_property
    def _incoming(self) -> dict[str, list[Edge]]:
        incoming: dict[str, list[Edge]] = {}
        for edge in self.edge_list:
            incoming.setdefault(edge.target, []).append(edge)
        return incoming

    def node(self, node_id: str) -> Node:
        """Return the node with this id.

        Raises:
            KeyError: There is no such node; its layer or position was not traced, or it is hidden.
        """
        return self.known_nodes[node_id]

    def nodes_of(self, kind: NodeKind | str, position: int | None = None) -> list[Node]:
        """Return the nodes of one kind, at one position or at all positions.

        A negative position counts from the end of the prompt, as in a request.

        Raises:
            ValueError: There is no such kind.
        """
        wanted, at = NodeKind.of(kind), self._from_start(position)
        return [
            node for node in self.node_list if node.kind is wanted and at in (None, node.position)
        ]

    def _from_start(self, position: int | None) -> int | None:
        """Return a position counted from 0, given one that may be negative, or None."""
        return position + len(self.prompt) if position is not None and position < 0 else position

    def edges_into(self, node: Node | str) -> list[Edge]:
        """Return all edges into a node, given as a node or an id, in the order of the stream."""
        return list(self._incoming.get(node if isinstance(node, str) else node.id, ()))

    def parts_of(self, node: Node | str) -> Parts:
        """Return the parts that add up to a node (given as a node or an id), largest |share| first.

        The shares add up to 1. The list is empty if the node is not a sum.
        """
        edges = (edge for edge in self.edges_into(node) if edge.kind is EdgeKind.PART)
        found = [Part(self.known_nodes[edge.source], edge) for edge in edges]
        return Parts(sorted(found, key=_position_and_share), self.prompt)

    def heads(self, position: int | None = None) -> Parts:
        """Return the heads' outputs with their shares of the sum of all heads, largest first.

        Those of several positions are in the order of the positions. Shares at different positions
        or layers are fractions of different sums.

        Raises:
            ValueError: The heads were requested without their sum, ATTENTION_CONCAT.
        """
        return self._with_sums(NodeKind.HEAD_OUTPUT, position, "ATTENTION_CONCAT")

    def neurons(self, position: int | None = None) -> Parts:
        """Return the MLP's neurons with their shares of the MLP's result, largest first.

        Those of several positions are in the order of the positions. These are the strongest of the
        neurons that the selection of the request has picked. Shares at different positions or
        layers are fractions of different sums.

        Raises:
            ValueError: The neurons were requested without their sum, MLP_OUTPUT or MLP_SUM.
        """
        return self._with_sums(NodeKind.MLP_VALUE, position, "MLP_OUTPUT and MLP_SUM")

    def _with_sums(self, kind: NodeKind, position: int | None, sums: str) -> Parts:
        found = self.parts_of_kind(kind, position)
        if found and all(part.edge is None for part in found):
            raise ValueError(
                f"the trace has {kind} without its sum, so there are no shares and contributions; "
                f"request {kind} with {sums}, or take the nodes from nodes_of({str(kind)!r})"
            )
        return found

    def parts_of_kind(self, kind: NodeKind | str, position: int | None = None) -> Parts:
        """Return the nodes of one kind as parts of their sums, largest share first.

        The edge of a part is None if its sum is hidden, and so are share and contribution.

        Raises:
            ValueError: There is no such kind.
        """
        leaving = self._leaving
        found = [Part(node, leaving.get(node.id)) for node in self.nodes_of(kind, position)]
        return Parts(sorted(found, key=_position_and_share), self.prompt)

    @cached_property
    def _leaving(self) -> dict[str, Edge]:
        """The edge from each part to its sum, by the id of the part."""
        return {edge.source: edge for edge in self.edge_list if edge.kind is EdgeKind.PART}

    @cached_property
    def nodes(self) -> pd.DataFrame:
        """A data frame with one row per node, indexed by id. Requires pandas."""
        return exports.node_frame(self.node_list, self.prompt, self._leaving)

    @cached_property
    def edges(self) -> pd.DataFrame:
        """A data frame with one row per edge. Requires pandas."""
        return exports.edge_frame(self.edge_list)

    def to_networkx(self) -> nx.MultiDiGraph[str]:
        """Return a directed graph of node ids. Requires networkx.

        Attributes of nodes and edges are numbers and strings, so networkx can write the graph as
        GraphML, GEXF and JSON. Lists of tokens are JSON strings, and characters that XML cannot
        hold are escaped as `<U+XXXX>`. Two nodes may have edges of several kinds; the kind is the
        key of the edge.
        """
        return exports.directed_graph(self.known_nodes, self.node_list, self.edge_list)


def _position_and_share(part: Part) -> tuple[int, float]:
    return part.node.position or 0, -abs(part.share or 0.0)
