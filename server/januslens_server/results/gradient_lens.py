"""The events of a GradientLens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from januslens_server.results.values import (
    End,
    Floats,
    Guarantee,
    Ints,
    MatrixKind,
    ModelFacts,
    ProjectionTable,
    Provenance,
    Side,
    StageTime,
    Token,
)


@dataclass(frozen=True)
class GradientHeader:
    """First event of a GradientLens."""

    provenance: Provenance
    facts: ModelFacts
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
    component_count: int
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
    """Last event of a GradientLens; a stream without one is incomplete."""

    matrices: int
    times: Sequence[StageTime]
    segments: Sequence[SegmentRow] = field(default_factory=tuple)


GradientEvent = GradientHeader | GradientMatrix | GradientSummary
