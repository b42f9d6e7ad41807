"""What a GradientLens sends beside its matrices: its header and its summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from januslens._results.kinds import MATRIX_KINDS, MatrixKind
from januslens._results.provenance import ModelSizes, Provenance, StageTime
from januslens._results.tokens import Token, TokenTable
from januslens.v1 import gradient_lens_pb2


@dataclass(frozen=True)
class GradientHeader:
    """What is known once the backward pass has run; a GradientLens's first event.

    Attributes:
        request_id: What to quote when asking about this call.
        provenance: Which weights computed it, where and with what.
        sizes: The model's layers, heads, neurons and tokens.
        prompt_tokens: Every token that the model read: the prompt and, teacher-forced, all target
            tokens but the last.
        loss: In nats; a logit difference in logits.
        targets: The loss's tokens, whose ranks the components report: the target's in order, or
            the preferred and the other one, or the suppressed ones.
        predicted: The model's own next token after the prompt.
        skipped: Kinds asked for that this architecture has not.
        stage_data_types: What each stage was computed in, e.g. `{"backward": "bfloat16"}`.
    """

    request_id: str
    provenance: Provenance
    sizes: ModelSizes
    prompt_tokens: tuple[Token, ...]
    loss: float
    targets: tuple[Token, ...]
    predicted: Token
    skipped: tuple[MatrixKind, ...]
    stage_data_types: Mapping[str, str]

    @classmethod
    def from_message(
        cls, message: gradient_lens_pb2.GradientHeader, tokens: TokenTable
    ) -> GradientHeader:
        """Read the header, the texts of the targets from `tokens`."""
        return cls(
            request_id=message.request_id,
            provenance=Provenance.from_message(message.provenance),
            sizes=ModelSizes.from_message(message.sizes),
            prompt_tokens=tuple(Token.from_message(t) for t in message.prompt_tokens),
            loss=message.loss,
            targets=tuple(tokens[token_id] for token_id in message.target_token_ids),
            predicted=tokens[message.predicted_token_id],
            skipped=tuple(MATRIX_KINDS.member(kind) for kind in message.skipped),
            stage_data_types=dict(message.stage_data_types),
        )


@dataclass(frozen=True)
class SegmentRow:
    """One segment of the prompt in one matrix (Backward Lens's figures of norms and ranks).

    Attributes:
        segment: `first_token`, `subject`, `last_subject_token`, `rest` or `last_token`.
        layer: The block.
        kind: The matrix.
        mean_vjp_norm: Mean length of the VJPs at the segment's positions.
        mean_target_rank: Mean rank of the target in their projections.
        positions: How many positions the segment has.
    """

    segment: str
    layer: int
    kind: MatrixKind
    mean_vjp_norm: float
    mean_target_rank: float
    positions: int

    @classmethod
    def from_message(cls, message: gradient_lens_pb2.SegmentRow) -> SegmentRow:
        """Read one row."""
        return cls(
            segment=message.segment,
            layer=message.layer,
            kind=MATRIX_KINDS.member(message.kind),
            mean_vjp_norm=message.mean_vjp_norm,
            mean_target_rank=message.mean_target_rank,
            positions=message.positions,
        )


@dataclass(frozen=True)
class GradientSummary:
    """A GradientLens's last event: without it the stream was cut.

    Attributes:
        matrices: How many matrices were sent.
        times: Seconds by stage on the server.
        segments: Norms and ranks by segment, where a subject was given.
    """

    matrices: int
    times: tuple[StageTime, ...]
    segments: tuple[SegmentRow, ...]

    @classmethod
    def from_message(cls, message: gradient_lens_pb2.GradientSummary) -> GradientSummary:
        """Read the summary."""
        return cls(
            matrices=message.matrices,
            times=tuple(StageTime.from_message(t) for t in message.times),
            segments=tuple(SegmentRow.from_message(row) for row in message.segments),
        )
