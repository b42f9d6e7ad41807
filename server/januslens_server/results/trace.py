"""The events of a Trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from januslens_server.results.values import (
    EdgeKind,
    Floats,
    Guarantee,
    Ints,
    ModelFacts,
    NodeKind,
    ProjectionTable,
    Provenance,
    StageTime,
    Token,
)

_NAMES = {kind: kind.name for kind in NodeKind}  # an enum's own `name` is slow


@dataclass(slots=True)  # not frozen: traces make tens of thousands, and that triples the time
class Node:
    """The coordinates of a flow-graph node.

    For OTHER, `sum_kind` is the kind of the sum that the left-out parts belong to.
    """

    kind: NodeKind
    position: int
    layer: int | None = None
    head: int | None = None
    source_position: int | None = None
    neuron: int | None = None
    expert: int | None = None
    sum_kind: NodeKind | None = None

    id: str = field(init=False, compare=False)
    """The coordinates as text, the same in every request: `L3/p7/MEMORY_VALUE/h2/s4`."""

    def __post_init__(self) -> None:
        # Built once, because edges, projections and messages all use it.
        text = f"p{self.position}/{_NAMES[self.kind]}"
        if self.layer is not None:
            text = f"L{self.layer}/{text}"
        if self.sum_kind is not None:
            text += f"/{_NAMES[self.sum_kind]}"
        if self.head is not None:
            text += f"/h{self.head}"
        if self.source_position is not None:
            text += f"/s{self.source_position}"
        if self.expert is not None:
            text += f"/e{self.expert}"
        if self.neuron is not None:
            text += f"/n{self.neuron}"
        self.id = text


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
    nodes: Sequence[Node]
    norms: Floats
    activations: Floats
    rows: Ints
    projections: ProjectionTable
    edges: Sequence[Edge]
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
