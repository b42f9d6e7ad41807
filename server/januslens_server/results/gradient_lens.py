"""The events of a GradientLens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from januslens_server.results.values import (
    End,
    Floats,
    Guarantee,
    Ints,
    LayerLevel,
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
    limited_layers: Sequence[LayerLevel] = ()
    layers_without_attention_gradients: Sequence[int] = ()


@dataclass(frozen=True)
class Entries:
    """The largest entries by absolute value of n vectors: indices and values, `[n, count]`."""

    indices: Ints
    values: Floats


@dataclass(frozen=True)
class Components:
    """The n largest components `x_i^T delta_i` of one gradient, largest first.

    `target_ranks` is `[n, targets]`. `inputs` `[n, d_in]` and `vjps` `[n, d_out]` are None unless
    requested.
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
    """Singular values `[r]`, and each one's fraction of the squared Frobenius norm."""

    values: Floats
    explained: Floats
    projections: ProjectionTable
    other_side: Entries


@dataclass(frozen=True)
class NeuronChanges:
    """The neurons that a descent step changes most: before, change and after."""

    neurons: Ints
    change_norms: Floats
    before: ProjectionTable
    change: ProjectionTable
    after: ProjectionTable | None


@dataclass(frozen=True)
class LoraGradient:
    """The gradients of a LoRA's A `[rank, d_in]` and B `[d_out, rank]`.

    `a_vjps` and `b_inputs` `[n, rank]`, for the components that are sent, are None unless
    requested. The other factors are those of the whole matrix.
    """

    rank: int
    scale: float
    a_norm: float
    b_norm: float
    a_vjps: Floats | None = None
    b_inputs: Floats | None = None


@dataclass(frozen=True)
class GradientMatrix:
    """The gradient of one weight matrix `W: [d_in, d_out]` as factors.

    `module` names the map if the kind is MODULE. Then `projected_side` may be None: neither factor
    is in the residual basis, and the components' projections are those of no vector.
    """

    layer: int
    kind: MatrixKind
    d_in: int
    d_out: int
    projected_side: Side | None
    promoted_end: End
    components: Components
    component_count: int
    frobenius_norm: float
    spectrum: Spectrum | None = None
    neurons: NeuronChanges | None = None
    verification: Guarantee | None = None
    expert: int | None = None
    lora: LoraGradient | None = None
    module: str = ""

    @property
    def nbytes(self) -> int:
        """Approximate size of the messages."""
        part, lora = self.components, self.lora
        sent: list[Floats | None] = [part.inputs, part.vjps]
        sent += [lora.a_vjps, lora.b_inputs] if lora else []
        factors = sum(a.nbytes for a in sent if a is not None)
        return 400 * len(part.positions) + factors


@dataclass(frozen=True)
class AttentionGradient:
    """A piece of the attention of one layer and of its gradients, row-major.

    `shape` `[pos, heads, sources]` is that of the whole tensors, and `offset` the number of the
    piece's first element.
    """

    layer: int
    shape: tuple[int, int, int]
    offset: int
    pattern: Floats
    pattern_gradient: Floats
    score_gradient: Floats

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return 3 * self.pattern.nbytes


@dataclass(frozen=True)
class SegmentRow:
    """Mean VJP norm and mean target rank over one segment of the prompt."""

    segment: str
    layer: int
    kind: MatrixKind
    mean_vjp_norm: float
    mean_target_rank: float | None
    positions: int
    module: str = ""


@dataclass(frozen=True)
class GradientSummary:
    """Last event of a GradientLens; a stream without one is incomplete."""

    matrices: int
    times: Sequence[StageTime]
    segments: Sequence[SegmentRow] = field(default_factory=tuple)


GradientEvent = GradientHeader | AttentionGradient | GradientMatrix | GradientSummary
