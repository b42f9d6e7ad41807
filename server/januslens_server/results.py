"""Result records: what the pipelines yield and `rpc.encode` turns into messages.

They hold plain Python values and numpy arrays, so that no later stage touches the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


class NodeKind(IntEnum):
    """Kinds of flow-graph nodes; numbers as in `trace.proto`, meanings in docs/semantics.md."""

    BLOCK_INPUT = 1
    ATTENTION_INPUT = 2
    QUERY = 3
    KEY = 4
    VALUE = 5
    HEAD_QUERY = 6
    HEAD_KEY = 7
    HEAD_VALUE = 8
    MEMORY_KEY = 9
    MEMORY_VALUE = 10
    HEAD_OUTPUT = 11
    ATTENTION_CONCAT = 12
    ATTENTION_NEURON = 13
    ATTENTION_BIAS = 14
    ATTENTION_SUM = 15
    ATTENTION_OUTPUT = 16
    RESIDUAL_MID = 17
    MLP_INPUT = 18
    MLP_KEY = 19
    MLP_UP = 20
    MLP_VALUE = 21
    MLP_BIAS = 22
    MLP_SUM = 23
    MLP_OUTPUT = 24
    BLOCK_OUTPUT = 25
    FINAL_NORM = 26
    PREDICTION = 27
    OTHER = 28


class EdgeKind(IntEnum):
    """Kinds of flow-graph edges; numbers as in `trace.proto`."""

    PART = 1
    NORM = 2
    PROJECT = 3
    SPLIT = 4
    ATTEND = 5
    RECALL = 6
    ACTIVATE = 7
    SCALE = 8
    GAP = 9


class MatrixKind(IntEnum):
    """Weight matrices of a block; numbers as in `gradient_lens.proto`."""

    Q = 1
    K = 2
    V = 3
    O = 4  # noqa: E741 - the field's name for the output projection
    FF1 = 5
    GATE = 6
    UP = 7
    FF2 = 8


class Side(IntEnum):
    """Which factor of a gradient lives in the residual basis and is projected."""

    INPUT = 1
    VJP = 2


class End(IntEnum):
    """Where in a projection the tokens stand that a descent step promotes."""

    UNSPECIFIED = 0
    TOP = 1
    BOTTOM = 2


@dataclass(frozen=True)
class Token:
    """A vocabulary entry; `start` and `end` are characters of the prompt it was read from."""

    id: int
    text: str
    raw: bytes
    start: int | None = None
    end: int | None = None


@dataclass(frozen=True)
class Provenance:
    """Which weights computed a result, where and with what."""

    model: str
    revision: str
    architecture: str
    data_type: str
    device: str
    attention: str
    versions: Mapping[str, str]
    batch_size: int = 1


@dataclass(frozen=True)
class Guarantee:
    """One property of a model that was measured when it was loaded."""

    name: str
    measured_error: float
    tolerance: float

    @property
    def held(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return self.measured_error <= self.tolerance


@dataclass(frozen=True)
class ModelFacts:
    """The sizes of a model, as the contract names them."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    n_experts: int
    vocab_size: int
    max_positions: int


class ModelState(IntEnum):
    """Where a configured model stands; numbers as in `models.proto`."""

    LOADING = 1
    READY = 2
    FAILED = 3


@dataclass(frozen=True)
class ModelStatus:
    """What is known of a configured model; provenance and facts only once it is loaded."""

    name: str
    state: ModelState
    reason: str = ""
    provenance: Provenance | None = None
    facts: ModelFacts | None = None
    guarantees: Sequence[Guarantee] = ()


@dataclass(frozen=True)
class ProjectionTable:
    """Logit-lens rows of n vectors, best first.

    Ids and values of the top are `[n, top_k]`, of the bottom `[n, bottom_k]`, lowest first; the
    rest is `[n]`, of the m targets `[n, m]` (probability, logit, rank; rank 0 = best). `projected`
    is False where a vector was exactly zero and has no reading.
    """

    projected: Flags
    top_ids: Ints
    top_logits: Floats
    top_probabilities: Floats
    bottom_ids: Ints
    bottom_logits: Floats
    bottom_probabilities: Floats
    entropy_bits: Floats
    target_ids: Ints
    target_ranks: Ints
    target_logits: Floats
    target_probabilities: Floats

    def token_ids(self) -> set[int]:
        """Every vocabulary id that the table names."""
        shown = np.concatenate([self.top_ids.ravel(), self.bottom_ids.ravel()])
        return set(shown.tolist())


@dataclass(frozen=True)
class Node:
    """A flow-graph node: its coordinates, its size and its row among the projections.

    For OTHER, `sum_kind` says which sum's left-out parts it holds.
    """

    kind: NodeKind
    position: int
    layer: int | None = None
    head: int | None = None
    source_position: int | None = None
    neuron: int | None = None
    expert: int | None = None
    sum_kind: NodeKind | None = None

    @property
    def id(self) -> str:
        """The coordinates as text, equal in every request: `L3/p7/MEMORY_VALUE/h2/s4`."""
        parts = [] if self.layer is None else [f"L{self.layer}"]
        parts += [f"p{self.position}", self.kind.name]
        if self.sum_kind is not None:
            parts.append(self.sum_kind.name)
        for letter, value in (
            ("h", self.head),
            ("s", self.source_position),
            ("e", self.expert),
            ("n", self.neuron),
        ):
            if value is not None:
                parts.append(f"{letter}{value}")
        return "/".join(parts)


@dataclass(frozen=True)
class Edge:
    """A flow-graph edge between two node ids; absent values are None."""

    source: str
    target: str
    kind: EdgeKind
    weight: float
    share: float | None = None
    attention: float | None = None
    logit_contribution: float | None = None
    overlap: float | None = None


@dataclass(frozen=True)
class PositionTarget:
    """The model's prediction at a position and the token whose rank everything there reports."""

    position: int
    target_token_id: int
    predicted_token_id: int
    target_probability: float
    target_rank: int
    target_logit: float
    constant_logit_contribution: float


@dataclass(frozen=True)
class TraceHeader:
    """First event of a Trace."""

    provenance: Provenance
    prompt_tokens: Sequence[Token]
    layers: Sequence[int]
    targets: Sequence[PositionTarget]


@dataclass(frozen=True)
class LayerGraph:
    """The nodes and edges of one layer at some positions.

    `norms` and `activations` are `[n]` (NaN = the node has no activation), `rows` maps a node to
    its row of `projections` (-1 = not projected), `vectors` is `[n, d_model]` on request.
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

    @property
    def nbytes(self) -> int:
        """About the size of its messages."""
        vectors = 0 if self.vectors is None else self.vectors.nbytes
        shown = self.projections.top_ids.size + self.projections.bottom_ids.size
        return 96 * len(self.nodes) + 96 * len(self.edges) + 12 * shown + vectors


@dataclass(frozen=True)
class StageTime:
    """Seconds that a stage of the request took."""

    stage: str
    seconds: float


@dataclass(frozen=True)
class TraceSummary:
    """Last event of a Trace; a stream without one was cut."""

    nodes: int
    edges: int
    times: Sequence[StageTime]
    checks: Sequence[Guarantee] = ()
    constant_logit_contribution: float | None = None


TraceEvent = TraceHeader | LayerGraph | TraceSummary


@dataclass(frozen=True)
class GradientHeader:
    """First event of a GradientLens."""

    provenance: Provenance
    prompt_tokens: Sequence[Token]
    loss: float
    target_token_ids: Sequence[int]
    predicted_token_id: int
    stage_data_types: Mapping[str, str]
    skipped: Sequence[MatrixKind] = ()


@dataclass(frozen=True)
class Entries:
    """The largest entries by absolute value of n vectors: indices and values `[n, count]`."""

    indices: Ints
    values: Floats


@dataclass(frozen=True)
class Components:
    """The factors `x_i^T delta_i` of one gradient, largest first; n rows.

    `target_ranks` is `[n, targets]`. `inputs` `[n, d_in]` and `vjps` `[n, d_out]` on request.
    """

    positions: Ints
    input_norms: Floats
    vjp_norms: Floats
    projections: ProjectionTable
    predicted_ranks: Ints
    target_ranks: Ints
    other_side: Entries
    inputs: Floats | None = None
    vjps: Floats | None = None


@dataclass(frozen=True)
class Spectrum:
    """Singular values `[r]` with the share of the squared Frobenius norm up to each."""

    values: Floats
    explained: Floats
    projections: ProjectionTable
    other_side: Entries


@dataclass(frozen=True)
class NeuronChanges:
    """The neurons that a descent step moves most, before, by what, and after."""

    neurons: Ints
    change_norms: Floats
    before: ProjectionTable
    change: ProjectionTable
    after: ProjectionTable | None


@dataclass(frozen=True)
class GradientMatrix:
    """The gradient of one weight matrix `W: [d_in, d_out]`, factorised."""

    layer: int
    kind: MatrixKind
    d_in: int
    d_out: int
    projected_side: Side
    promoted_end: End
    components: Components
    frobenius_norm: float
    spectrum: Spectrum | None = None
    neurons: NeuronChanges | None = None
    verification: Guarantee | None = None
    expert: int | None = None

    @property
    def nbytes(self) -> int:
        """About the size of its messages."""
        part = self.components
        factors = sum(a.nbytes for a in (part.inputs, part.vjps) if a is not None)
        return 400 * len(part.positions) + factors


@dataclass(frozen=True)
class SegmentRow:
    """Mean VJP norm and target rank over the positions of one segment of the prompt."""

    segment: str
    layer: int
    kind: MatrixKind
    mean_vjp_norm: float
    mean_target_rank: float | None
    positions: int


@dataclass(frozen=True)
class GradientSummary:
    """Last event of a GradientLens; a stream without one was cut."""

    matrices: int
    times: Sequence[StageTime]
    segments: Sequence[SegmentRow] = field(default_factory=tuple)


GradientEvent = GradientHeader | GradientMatrix | GradientSummary


@dataclass(frozen=True)
class Effect:
    """A prompt's next-token distribution before and after an edit; ranks count from 0."""

    label: str
    target_token_id: int
    probability_before: float
    probability_after: float
    rank_before: int
    rank_after: int
    predicted_before: int
    predicted_after: int
    kl_bits: float


@dataclass(frozen=True)
class EditPreview:
    """What an edit did to its own prompt and to the probes, in their order."""

    edited: Effect
    probes: Sequence[Effect]
    provenance: Provenance
