"""Results of gradient lenses and of edit previews."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING

from januslens.results import exports
from januslens.results.attention import AttentionGradient
from januslens.results.exports import (
    PageFrame,
    figure_of,
    json_lines,
    notebook_html,
    page_html,
)
from januslens.results.kinds import MATRIX_KINDS, MatrixKind
from januslens.results.matrices import Matrix, kind_of, matrix_name
from januslens.results.message_file import save_messages
from januslens.results.models import LayerLevel, ModelSizes, Provenance, StageTime
from januslens.results.tokens import Token, TokenTable
from januslens.v1 import edits_pb2, gradient_lens_pb2

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# The matrices that a request's FF1 means in a gated MLP.
_GATED = frozenset({MatrixKind.GATE, MatrixKind.UP})


@dataclass(frozen=True)
class Effect:
    """The next-token distribution of one prompt, before and after an edit.

    Attributes:
        label: The label of the probe; empty for the edited prompt.
        target: The token whose probability and rank are reported.
        probability_before: The target's probability without the edit.
        probability_after: The target's probability with the edit.
        log_probability_before: Natural logarithm of `probability_before`, which does not underflow.
        log_probability_after: Natural logarithm of `probability_after`, which does not underflow.
        rank_before: The target's rank without the edit; 0 = most likely.
        rank_after: The target's rank with the edit.
        predicted_before: The model's prediction without the edit.
        predicted_after: The model's prediction with the edit.
        kl_bits: `KL(before || after)` of the whole distribution, in bits.
    """

    label: str
    target: Token
    probability_before: float
    probability_after: float
    log_probability_before: float
    log_probability_after: float
    rank_before: int
    rank_after: int
    predicted_before: Token
    predicted_after: Token
    kl_bits: float

    @classmethod
    def from_message(cls, message: edits_pb2.Effect, tokens: TokenTable) -> Effect:
        """Read one effect; `tokens` has the texts of its tokens."""
        return cls(
            label=message.label,
            target=tokens[message.target_token_id],
            probability_before=message.probability_before,
            probability_after=message.probability_after,
            log_probability_before=message.log_probability_before,
            log_probability_after=message.log_probability_after,
            rank_before=message.rank_before,
            rank_after=message.rank_after,
            predicted_before=tokens[message.predicted_before],
            predicted_after=tokens[message.predicted_after],
            kl_bits=message.kl_bits,
        )


def _gradient_cosine(
    message: edits_pb2.PreviewEditResponse | edits_pb2.EditCell,
) -> float | None:
    return message.gradient_cosine if message.HasField("gradient_cosine") else None


@dataclass(frozen=True)
class EditPreview:
    """The effects of an edit on its own prompt and on the probes.

    Attributes:
        edited: The effect on the edited prompt.
        probes: The effects on the probes, in the order of the request.
        provenance: The model's revision, data type, device and library versions.
        gradient_cosine: Cosine of a forward shift and of a descent step on the same matrix; None
            unless requested.
        response: The message that it was read from.
    """

    edited: Effect
    probes: tuple[Effect, ...]
    provenance: Provenance
    gradient_cosine: float | None
    response: edits_pb2.PreviewEditResponse = field(repr=False, compare=False)

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with one row per prompt, the edited one first. Requires pandas."""
        return exports.preview_frame(self)

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)

    @classmethod
    def from_message(cls, message: edits_pb2.PreviewEditResponse) -> EditPreview:
        """Read the whole response."""
        tokens = TokenTable(message.tokens)
        return cls(
            edited=Effect.from_message(message.edited, tokens),
            probes=tuple(Effect.from_message(probe, tokens) for probe in message.probes),
            provenance=Provenance.from_message(message.provenance),
            gradient_cosine=_gradient_cosine(message),
            response=message,
        )


@dataclass(frozen=True)
class EditCell:
    """The effects of one edit of a grid.

    Attributes:
        layer: The layer that the edit changes.
        strength: The learning rate of a descent step, or eta of a forward shift.
        edited: The effect on the edited prompt.
        probes: The effects on the probes, in the order of the request.
        gradient_cosine: Cosine of a forward shift and of a descent step on the same matrix; None
            unless requested.
    """

    layer: int
    strength: float
    edited: Effect
    probes: tuple[Effect, ...]
    gradient_cosine: float | None


@dataclass(frozen=True, repr=False)
class EditPreviews:
    """The effects of a grid of edits, by layer and then in the order of the strengths.

    Attributes:
        cells: The edits.
        provenance: The model's revision, data type, device and library versions.
        response: The message that it was read from.
    """

    cells: tuple[EditCell, ...]
    provenance: Provenance
    response: edits_pb2.PreviewEditResponse = field(repr=False, compare=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of the grid, ascending."""
        return tuple(dict.fromkeys(cell.layer for cell in self.cells))

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths of the grid, in the order of the request."""
        return tuple(dict.fromkeys(cell.strength for cell in self.cells))

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with one row per edit and prompt. Requires pandas.

        For a table of layers and strengths, use for example
        `frame.pivot(index="layer", columns="strength", values="probability_after")`.
        """
        return exports.edit_grid_frame(self.cells)

    def __repr__(self) -> str:
        """A one-line description, because there may be many edits."""
        return f"<EditPreviews: {len(self.layers)} layers x {len(self.strengths)} strengths>"

    @classmethod
    def from_message(cls, message: edits_pb2.PreviewEditResponse) -> EditPreviews:
        """Read the whole response."""
        tokens = TokenTable(message.tokens)
        return cls(
            cells=tuple(
                EditCell(
                    layer=cell.layer,
                    strength=cell.strength,
                    edited=Effect.from_message(cell.edited, tokens),
                    probes=tuple(Effect.from_message(probe, tokens) for probe in cell.probes),
                    gradient_cosine=_gradient_cosine(cell),
                )
                for cell in message.cells
            ),
            provenance=Provenance.from_message(message.provenance),
            response=message,
        )


@dataclass(frozen=True)
class GradientHeader:
    """Prompt, loss and targets of a gradient; the first event of its stream.

    Attributes:
        request_id: Id of the call, as in the server's log.
        provenance: The model's revision, data type, device and library versions.
        sizes: The model's layers, heads, neurons and tokens.
        prompt_tokens: The model's input: the prompt and, with teacher forcing, all target tokens
            except the last.
        loss: Value of the loss, in nats; that of a logit difference is in logits.
        targets: The tokens of the loss, whose ranks the components report: the target tokens in
            order, or `preferred` and `other`, or the suppressed tokens.
        predicted: The model's own prediction after the prompt.
        skipped: Requested kinds that this architecture does not have.
        stage_data_types: Data type of each stage, e.g. `{"backward": "bfloat16"}`.
        limited_layers: The requested layers whose parts are not all shown, and why.
        layers_without_attention_gradients: The requested layers of which no attention gradients are
            sent; empty unless they were requested.
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
    limited_layers: tuple[LayerLevel, ...] = ()
    layers_without_attention_gradients: tuple[int, ...] = ()

    @classmethod
    def from_message(
        cls, message: gradient_lens_pb2.GradientHeader, tokens: TokenTable
    ) -> GradientHeader:
        """Read the header; `tokens` has the texts of the targets."""
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
            limited_layers=tuple(
                LayerLevel.from_message(level) for level in message.limited_layers
            ),
            layers_without_attention_gradients=tuple(message.layers_without_attention_gradients),
        )


_SEGMENTS = {
    number: name.removeprefix("PROMPT_SEGMENT_").lower()
    for name, number in gradient_lens_pb2.PromptSegment.items()
}


@dataclass(frozen=True)
class SegmentRow:
    """Norms and ranks of one matrix over a segment of the prompt (Backward Lens, section 6).

    Attributes:
        segment: `first_token`, `subject`, `last_subject_token`, `rest` or `last_token`.
        layer: The layer.
        kind: The kind of the matrix, or the name of the module of a linear map.
        mean_vjp_norm: Mean length of the VJPs at the segment's positions.
        mean_target_rank: Mean rank of the first target in the projected factor; None if the factor
            is exactly zero at all positions of the segment.
        positions: Number of positions in the segment.
    """

    segment: str
    layer: int
    kind: MatrixKind | str
    mean_vjp_norm: float
    mean_target_rank: float | None
    positions: int

    @classmethod
    def from_message(cls, message: gradient_lens_pb2.SegmentRow) -> SegmentRow:
        """Read one row."""
        return cls(
            segment=_SEGMENTS.get(message.segment, str(message.segment)),
            layer=message.layer,
            kind=kind_of(message),
            mean_vjp_norm=message.mean_vjp_norm,
            mean_target_rank=message.mean_target_rank
            if message.HasField("mean_target_rank")
            else None,
            positions=message.positions,
        )


class Segments(tuple[SegmentRow, ...]):
    """The rows of a gradient's table of segments."""

    __slots__ = ()

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with one row per matrix and segment. Requires pandas."""
        return exports.segment_frame(self)


@dataclass(frozen=True)
class GradientSummary:
    """The last event of a GradientLens; a stream without one is incomplete.

    Attributes:
        matrices: Number of matrices sent.
        times: Seconds by stage on the server.
        segments: Norms and ranks by segment; empty without a subject.
    """

    matrices: int
    times: tuple[StageTime, ...]
    segments: Segments

    @classmethod
    def from_message(cls, message: gradient_lens_pb2.GradientSummary) -> GradientSummary:
        """Read the summary."""
        return cls(
            matrices=message.matrices,
            times=tuple(StageTime.from_message(t) for t in message.times),
            segments=Segments(SegmentRow.from_message(row) for row in message.segments),
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Gradient:
    """The gradient of a prompt as factors (Backward Lens; Katz, Belinkov, Geva & Wolf, 2024).

    Attributes:
        header: Prompt, loss, targets and provenance.
        attention: The attention of each layer and its gradients, from the last layer down; empty
            unless requested.
        matrices: The gradients, from the last layer down.
        summary: Counts, times and segments; None if the stream was interrupted.
        responses: The messages that this result was read from.
    """

    header: GradientHeader
    attention: tuple[AttentionGradient, ...]
    matrices: tuple[Matrix, ...]
    summary: GradientSummary | None
    responses: tuple[gradient_lens_pb2.GradientLensResponse, ...] = field(repr=False, compare=False)

    @property
    def loss(self) -> float:
        """The loss in nats; that of a logit difference is in logits."""
        return self.header.loss

    @property
    def prompt_tokens(self) -> tuple[Token, ...]:
        """The model's input, including teacher-forced target tokens."""
        return self.header.prompt_tokens

    @property
    def provenance(self) -> Provenance:
        """The model's revision, data type, device and library versions."""
        return self.header.provenance

    @property
    def segments(self) -> Segments:
        """Norms and ranks by segment of the prompt; empty without a subject."""
        return self.summary.segments if self.summary else Segments()

    def matrix(self, layer: int, kind: MatrixKind | str, expert: int | None = None) -> Matrix:
        """Return the gradient of one matrix; a negative layer counts from the last one.

        `kind` may be the name of the module of a linear map, for example `linear_attn.out_proj`.

        Raises:
            ValueError: There is no such kind or module.
            KeyError: The matrix was not requested, or the architecture does not have it.
        """
        wanted = self._kind(kind)
        layer += self.header.sizes.n_layers if layer < 0 else 0
        for matrix in self.matrices:
            if (matrix.layer, matrix.kind, matrix.expert) == (layer, wanted, expert):
                return matrix
        here = ", ".join(matrix.name for matrix in self.matrices)
        name = matrix_name(layer, wanted, expert)
        gated = wanted is MatrixKind.FF1 and any(m.kind in _GATED for m in self.matrices)
        hint = f"; in a gated MLP, FF1 is two matrices: of_kind('FF1', {layer})" if gated else ""
        raise KeyError(f"the gradient has no matrix {name}; expected one of {here}{hint}")

    def attention_of(self, layer: int) -> AttentionGradient:
        """Return the attention of a layer and its gradients; negative layers count from the last.

        Raises:
            KeyError: It was not requested.
        """
        layer += self.header.sizes.n_layers if layer < 0 else 0
        for found in self.attention:
            if found.layer == layer:
                return found
        raise KeyError(
            f"the gradient has no attention of layer {layer}; request it with attention=True"
        )

    def of_kind(self, kind: MatrixKind | str, layer: int | None = None) -> list[Matrix]:
        """Return the gradients of one kind of matrix, in all layers from the last down or in one.

        In a gated MLP, FF1 means GATE and UP, as in a request. `kind` may be the name of a module.
        A negative layer counts from the last one.

        Raises:
            ValueError: There is no such kind or module.
        """
        wanted = self._kind(kind)
        at = layer if layer is None or layer >= 0 else layer + self.header.sizes.n_layers
        here = [matrix for matrix in self.matrices if at in (None, matrix.layer)]
        found = [matrix for matrix in here if matrix.kind == wanted]
        if not found and wanted is MatrixKind.FF1:
            return [matrix for matrix in here if matrix.kind in _GATED]
        return found

    def _kind(self, kind: MatrixKind | str) -> MatrixKind | str:
        named = any(matrix.kind == kind for matrix in self.matrices)
        return kind if named else MatrixKind.of(kind)

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with one row per component of every matrix. Requires pandas."""
        return exports.component_frame(self.matrices, self.prompt_tokens)

    def save_factors(self, path: str | PathLike[str]) -> None:
        """Write all factors to a safetensors file. Requires safetensors.

        The names are those of `Matrix.save_factors`. The metadata name the model and the prompt.

        Raises:
            ValueError: The gradient was requested without factors.
        """
        exports.save_factors(self.matrices, path, self._file_metadata())

    def _file_metadata(self) -> dict[str, str]:
        return {
            "model": self.provenance.model,
            "revision": self.provenance.revision,
            "loss": repr(self.loss),
            "token_ids": " ".join(str(token.id) for token in self.prompt_tokens),
            "target_token_ids": " ".join(str(token.id) for token in self.header.targets),
        }

    def __repr__(self) -> str:
        """A one-line description, because the gradient may have thousands of projections."""
        prompt = "".join(token.text for token in self.prompt_tokens)
        return f"<Gradient on {prompt!r}: loss {self.loss:.4g}, {len(self.matrices)} matrices>"

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)

    def figure(self, kind: MatrixKind | str | None = None, *, ax: Axes | None = None) -> Figure:
        """Draw the norms |δ| of one kind of matrix by layer and position. Requires matplotlib.

        For prompts of up to 16 tokens, the cells have the token that a descent step promotes most
        or, for a projected input x, its top token.

        Args:
            kind: The kind of matrix, such as `FF2`; None = the first one with projected VJPs.
            ax: The axes to draw in; None = those of a new figure, which is not in pyplot's list of
                open figures.

        Raises:
            ValueError: The gradient has no matrices of this kind.
        """
        return figure_of(self, ax, kind=None if kind is None else MatrixKind(kind))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the messages of the stream to a file that `januslens.load` reads.

        Raises:
            OSError: The file cannot be written.
        """
        save_messages(path, self.responses)

    def to_json_lines(self) -> Iterable[str]:
        """Return the stream as canonical protobuf JSON, one message per line, like `--json`."""
        return json_lines(self.responses)

    def to_html(self, previews: Mapping[str, EditPreview] | None = None) -> str:
        """Return this gradient as a page: one HTML file that needs no network.

        Args:
            previews: Results of `client.preview_edit` to show on the page, by title.
        """
        return page_html(self, previews or {})

    def show(
        self, previews: Mapping[str, EditPreview] | None = None, *, height: int = 800
    ) -> PageFrame:
        """Show the page of `to_html` in a notebook; `height` is in pixels."""
        return PageFrame(self.to_html(previews), height)

    @classmethod
    def from_parts(
        cls,
        header: GradientHeader,
        attention: Sequence[AttentionGradient],
        matrices: Sequence[Matrix],
        summary: GradientSummary | None,
        responses: Sequence[gradient_lens_pb2.GradientLensResponse],
    ) -> Gradient:
        """Combine the events of a stream."""
        return cls(
            header=header,
            attention=tuple(attention),
            matrices=tuple(matrices),
            summary=summary,
            responses=tuple(responses),
        )
