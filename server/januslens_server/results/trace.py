"""The events of a Trace."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import repeat
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from januslens_server.results.values import (
    EdgeKind,
    Floats,
    Guarantee,
    Ints,
    LayerLevel,
    ModelFacts,
    NodeKind,
    ProjectionTable,
    Provenance,
    StageTime,
    Token,
)

_NAMES = {kind: kind.name for kind in NodeKind}  # an enum's own `name` is slow


@dataclass(frozen=True, slots=True)
class Members:
    """The parts that an OTHER node sums: their number, and a digest of which they are."""

    count: int
    digest: int

    @classmethod
    def left_out(cls, population: Sequence[int], size: int, listed: Sequence[int]) -> Members:
        """Return the members of a sum of `size` parts, apart from the `listed` ones.

        `population` describes all parts, so that equal numbers in different sums differ.
        """
        numbers = [len(population), *population, *sorted(listed)]
        hashed = hashlib.blake2b(np.array(numbers, "<i8").tobytes(), digest_size=8).digest()
        # 63 bits, which fit into an int64.
        return cls(size - len(listed), int.from_bytes(hashed, "little") >> 1)


@dataclass(slots=True)  # not frozen: that triples the time to create one
class Node:
    """The coordinates of a flow-graph node.

    For OTHER, `sum_kind` is the kind of the sum that the left-out parts belong to, and `members`
    are these parts, if they are known.
    """

    kind: NodeKind
    position: int
    layer: int | None = None
    head: int | None = None
    source_position: int | None = None
    neuron: int | None = None
    expert: int | None = None
    sum_kind: NodeKind | None = None
    members: Members | None = None

    id: str = field(init=False, compare=False)
    """The coordinates as text, the same in every request: `L3/p7/MEMORY_VALUE/h2/s4`."""

    def __post_init__(self) -> None:
        text = _common_text(self.kind, self.position, self.layer, self.sum_kind)
        if self.head is not None:
            text += f"/h{self.head}"
        if self.source_position is not None:
            text += f"/s{self.source_position}"
        if self.expert is not None:
            text += f"/e{self.expert}"
        if self.neuron is not None:
            text += f"/n{self.neuron}"
        self.id = text


def _common_text(
    kind: NodeKind, position: int, layer: int | None, sum_kind: NodeKind | None
) -> str:
    text = f"p{position}/{_NAMES[kind]}"
    if layer is not None:
        text = f"L{layer}/{text}"
    return text if sum_kind is None else f"{text}/{_NAMES[sum_kind]}"


@dataclass(slots=True)
class NodeRun:
    """Nodes of one kind and layer, which differ in the other coordinates.

    The lists have one entry for each node; None means that the nodes do not have the coordinate.
    Without any list, the run is a single node. `position` is a list for nodes that have no other.
    """

    kind: NodeKind
    position: int | Sequence[int]
    layer: int | None = None
    heads: Sequence[int] | None = None
    source_positions: Sequence[int] | None = None
    neurons: Sequence[int] | None = None
    experts: Sequence[int] | None = None
    sum_kind: NodeKind | None = None
    members: Sequence[Members] | None = None

    ids: list[str] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.position, int):
            places = self.position
            self.ids = [_common_text(self.kind, at, self.layer, self.sum_kind) for at in places]
            return
        text = _common_text(self.kind, self.position, self.layer, self.sum_kind)
        lists = {
            "h": self.heads,
            "s": self.source_positions,
            "e": self.experts,
            "n": self.neurons,
        }
        given = {letter: values for letter, values in lists.items() if values is not None}
        ids = [text]
        for i, (letter, values) in enumerate(given.items()):
            before = ids if i else repeat(text, len(values))
            ids = [f"{start}/{letter}{value}" for start, value in zip(before, values, strict=True)]
        self.ids = ids


class NodeColumn(IntEnum):
    """Columns of `Nodes.coordinates`, in the order of the fields of `Node`."""

    KIND = 0
    POSITION = 1
    LAYER = 2
    HEAD = 3
    SOURCE_POSITION = 4
    NEURON = 5
    EXPERT = 6
    SUM_KIND = 7
    MEMBERS = 8
    MEMBERS_DIGEST = 9


class Nodes(Sequence[Node]):
    """Nodes as columns: `ids`, and `coordinates` `[n, 10]` by `NodeColumn`, where -1 means absent.

    A trace may have tens of thousands of nodes, so a `Node` is only created when it is read.
    """

    def __init__(self, ids: list[str], coordinates: Ints) -> None:
        self.ids = ids
        self.coordinates = coordinates

    @classmethod
    def joined(cls, parts: Sequence[Nodes]) -> Nodes:
        """Return the nodes of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        empty = np.empty((0, len(NodeColumn)), np.int64)
        ids = [node_id for part in parts for node_id in part.ids]
        return cls(ids, np.concatenate([empty, *(part.coordinates for part in parts)]))

    def rows(self, kept: Ints) -> Nodes:
        """Return the nodes with these indices."""
        if len(kept) == len(self):
            return self
        return Nodes([self.ids[i] for i in kept.tolist()], self.coordinates[kept])

    def column(self, column: NodeColumn) -> Ints:
        """Return one coordinate of all nodes."""
        return self.coordinates[:, column]

    def __len__(self) -> int:
        """Return the number of nodes."""
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Node: ...
    @overload
    def __getitem__(self, index: slice) -> list[Node]: ...
    def __getitem__(self, index: int | slice) -> Node | list[Node]:
        """Return one node, or a list of nodes."""
        if isinstance(index, slice):
            return [_node(row) for row in self.coordinates[index].tolist()]
        return _node(self.coordinates[index].tolist())

    def __iter__(self) -> Iterator[Node]:
        """Yield each node."""
        return map(_node, self.coordinates.tolist())

    def __eq__(self, other: object) -> bool:
        """Whether the nodes are equal, and in the same order."""
        return isinstance(other, Nodes) and np.array_equal(self.coordinates, other.coordinates)

    __hash__ = None  # type: ignore[assignment]  # as for every type with an own `__eq__`


def coordinates(runs: Sequence[NodeRun]) -> Ints:
    """Return the coordinates `[n, 10]` of the nodes of all runs, in order."""
    found = np.full((sum(len(run.ids) for run in runs), len(NodeColumn)), -1, np.int64)
    first = 0
    for run in runs:
        rows = found[first : first + len(run.ids)]
        first += len(run.ids)
        places = (run.heads, run.source_positions, run.neurons, run.experts)
        values = (run.kind, run.position, run.layer, *places, run.sum_kind)
        for column, value in enumerate(values):
            if value is not None:
                rows[:, column] = value
        if run.members:
            rows[:, NodeColumn.MEMBERS :] = [(each.count, each.digest) for each in run.members]
    return found


def _node(row: list[int]) -> Node:
    kind, position, *places, sum_kind, count, digest = row
    layer, head, source_position, neuron, expert = (None if i < 0 else i for i in places)
    of_sum = None if sum_kind < 0 else NodeKind(sum_kind)
    members = None if count < 0 else Members(count, digest)
    place = (layer, head, source_position, neuron, expert)
    return Node(NodeKind(kind), position, *place, of_sum, members)


class Edge(NamedTuple):
    """A flow-graph edge from the node `source` to the node `target`; absent values are None."""

    source: str
    target: str
    kind: EdgeKind
    weight: float
    share: float | None = None
    attention: float | None = None
    logit_contribution: float | None = None
    attribution: float | None = None
    overlap: float | None = None


@dataclass(frozen=True, eq=False)
class Edges(Sequence[Edge]):
    """Edges as columns `[n]`; NaN means absent. An `Edge` is only created when it is read."""

    sources: list[str]
    targets: list[str]
    kinds: Ints
    weights: Floats
    shares: Floats
    attention: Floats
    logit_contributions: Floats
    attributions: Floats
    overlaps: NDArray[np.float64]

    @classmethod
    def joined(cls, parts: Sequence[Edges]) -> Edges:
        """Return the edges of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            [end for part in parts for end in part.sources],
            [end for part in parts for end in part.targets],
            np.concatenate([np.empty(0, np.int64), *(part.kinds for part in parts)]),
            *(
                np.concatenate([_NO_FLOATS, *(getattr(part, name) for part in parts)])
                for name in _EDGE_FLOATS
            ),
        )

    def rows(self, kept: Ints) -> Edges:
        """Return the edges with these indices."""
        where = kept.tolist()
        return Edges(
            [self.sources[i] for i in where],
            [self.targets[i] for i in where],
            self.kinds[kept],
            *(getattr(self, name)[kept] for name in _EDGE_FLOATS),
        )

    def __len__(self) -> int:
        """Return the number of edges."""
        return len(self.sources)

    @overload
    def __getitem__(self, index: int) -> Edge: ...
    @overload
    def __getitem__(self, index: slice) -> list[Edge]: ...
    def __getitem__(self, index: int | slice) -> Edge | list[Edge]:
        """Return one edge, or a list of edges."""
        where = np.arange(len(self))[index]
        found = list(self.rows(np.atleast_1d(where)))
        return found if isinstance(index, slice) else found[0]

    def __iter__(self) -> Iterator[Edge]:
        """Yield each edge."""
        columns = (_present(getattr(self, name)) for name in _EDGE_FLOATS)
        kinds = map(EdgeKind, self.kinds.tolist())
        return map(Edge, self.sources, self.targets, kinds, *columns)

    def __eq__(self, other: object) -> bool:
        """Whether the edges are equal, and in the same order."""
        return isinstance(other, Edges) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as for every type with an own `__eq__`


_NO_FLOATS = np.empty(0, np.float32)
_EDGE_FLOATS = ("weights", "shares", "attention", "logit_contributions", "attributions", "overlaps")


def _present(column: NDArray[Any]) -> list[Any]:
    """Replace NaN, which marks absent values, by None."""
    absent = np.isnan(column)
    if absent.all():
        return [None] * len(column)
    values: list[Any] = column.tolist()
    for i in np.flatnonzero(absent).tolist():
        values[i] = None
    return values


@dataclass(frozen=True)
class PositionTarget:
    """The model's prediction at a position, and the token whose rank projections report.

    With a second token, `logit_difference` is the target's logit minus that token's logit.
    """

    position: int
    target_token_id: int
    predicted_token_id: int
    target_probability: float
    target_rank: int
    target_logit: float
    constant_logit_contribution: float
    logit_difference: float | None = None
    target_log_probability: float = 0.0


@dataclass(frozen=True)
class TraceHeader:
    """First event of a Trace."""

    provenance: Provenance
    facts: ModelFacts
    prompt_tokens: Sequence[Token]
    layers: Sequence[int]
    targets: Sequence[PositionTarget]
    selected_by: int
    other: int | None = None
    limited_layers: Sequence[LayerLevel] = ()


@dataclass(frozen=True)
class Gradients:
    """The gradients of a layer's states.

    `norms` is `[n]` over the nodes of the layer; NaN means that the node has no gradient. `rows`
    maps a node to its row of `projections`; -1 means not projected.
    """

    norms: Floats
    rows: Ints
    projections: ProjectionTable


@dataclass(frozen=True)
class LayerGraph:
    """The nodes and edges of one layer at some positions.

    `norms` and `activations` are `[n]`; NaN means that a node has no activation. `rows` maps a node
    to its row of `projections`; -1 means not projected. `vectors` is `[n, d_model]`, or None unless
    requested.
    """

    layer: int
    nodes: Nodes
    norms: Floats
    activations: Floats
    rows: Ints
    projections: ProjectionTable
    edges: Edges
    last: bool
    vectors: Floats | None = None
    gradients: Gradients | None = None

    @property
    def nbytes(self) -> int:
        """Approximate size of the messages."""
        vectors = 0 if self.vectors is None else self.vectors.nbytes
        tables = [self.projections] + ([self.gradients.projections] if self.gradients else [])
        shown = sum(table.top_ids.size + table.bottom_ids.size for table in tables)
        return 96 * len(self.nodes) + 96 * len(self.edges) + 12 * shown + vectors


@dataclass(frozen=True)
class TraceSummary:
    """Last event of a Trace; a stream without one is incomplete."""

    nodes: int
    edges: int
    times: Sequence[StageTime]
    checks: Sequence[Guarantee] = ()
    constant_logit_contribution: float | None = None


TraceEvent = TraceHeader | LayerGraph | TraceSummary
