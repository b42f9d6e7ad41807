"""The gradient of a loss with respect to the weights, read in the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from januslens._notebook.frame import PageFrame
from januslens._notebook.gradients import gradient_html
from januslens._results import gradient_files, gradient_frames
from januslens._results.edits import EditPreview
from januslens._results.gradient_events import GradientHeader, GradientSummary, SegmentRow
from januslens._results.json_lines import json_lines
from januslens._results.kinds import MatrixKind
from januslens._results.matrices import Matrix
from januslens._results.provenance import Provenance
from januslens._results.tokens import Token
from januslens.v1 import gradient_lens_pb2
from januslens.viewer.html import gradient_page

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, repr=False)
class Gradient:
    """What a GradientLens found (Backward Lens; Katz, Belinkov, Geva & Wolf, 2024).

    Attributes:
        header: Prompt, loss, targets and provenance.
        matrices: The gradients, from the last layer down.
        summary: Counts, times and segments; None if the stream was cut.
        responses: The messages that it was read from.
    """

    header: GradientHeader
    matrices: tuple[Matrix, ...]
    summary: GradientSummary | None
    responses: tuple[gradient_lens_pb2.GradientLensResponse, ...] = field(repr=False, compare=False)

    @property
    def loss(self) -> float:
        """The loss in nats (a logit difference in logits)."""
        return self.header.loss

    @property
    def prompt_tokens(self) -> tuple[Token, ...]:
        """Every token that the model read, teacher-forced target tokens included."""
        return self.header.prompt_tokens

    @property
    def provenance(self) -> Provenance:
        """Which weights computed it, where and with what."""
        return self.header.provenance

    @property
    def segments(self) -> tuple[SegmentRow, ...]:
        """Norms and ranks by segment of the prompt; empty without a subject."""
        return self.summary.segments if self.summary else ()

    def matrix(self, layer: int, kind: MatrixKind | str, expert: int | None = None) -> Matrix:
        """One matrix's gradient.

        Raises:
            ValueError: There is no such kind.
            KeyError: It was not asked for, or this architecture has not got it.
        """
        wanted = MatrixKind.of(kind)
        for matrix in self.matrices:
            if (matrix.layer, matrix.kind, matrix.expert) == (layer, wanted, expert):
                return matrix
        here = ", ".join(matrix.name for matrix in self.matrices)
        raise KeyError(f"expected one of {here}; got layer {layer}, {wanted}, expert {expert}")

    def of_kind(self, kind: MatrixKind | str) -> list[Matrix]:
        """All layers' gradients of one kind, from the last layer down.

        Raises:
            ValueError: There is no such kind.
        """
        wanted = MatrixKind.of(kind)
        return [matrix for matrix in self.matrices if matrix.kind is wanted]

    def to_pandas(self) -> pd.DataFrame:
        """One row a component of every matrix. Needs pandas."""
        return gradient_frames.component_frame(self.matrices, self.prompt_tokens)

    def save(self, path: str | Path) -> None:
        """Write all factors to a safetensors file, as `Matrix.save` does. Needs safetensors.

        Its metadata say which model and prompt they belong to.

        Raises:
            ValueError: The gradient was made without factors.
        """
        gradient_files.save(self.matrices, path, self._file_metadata())

    def _file_metadata(self) -> dict[str, str]:
        return {
            "model": self.provenance.model,
            "revision": self.provenance.revision,
            "loss": repr(self.loss),
            "token_ids": " ".join(str(token.id) for token in self.prompt_tokens),
            "target_token_ids": " ".join(str(token.id) for token in self.header.targets),
        }

    def __repr__(self) -> str:
        """One line: it may hold thousands of projections."""
        prompt = "".join(token.text for token in self.prompt_tokens)
        return f"<Gradient on {prompt!r}: loss {self.loss:.4g}, {len(self.matrices)} matrices>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return gradient_html(self)

    def to_json_lines(self) -> Iterable[str]:
        """The stream as canonical protobuf JSON, one message a line: what `--json` prints."""
        return json_lines(self.responses)

    def to_html(self, previews: Mapping[str, EditPreview] | None = None) -> str:
        """This gradient as a page: one HTML file that needs no network.

        Args:
            previews: What edits would do, from `client.preview_edit`, each under its title.
        """
        effects = {title: preview.response for title, preview in (previews or {}).items()}
        return gradient_page(self.responses, effects, self.prompt_tokens)

    def show(
        self, previews: Mapping[str, EditPreview] | None = None, *, height: int = 800
    ) -> PageFrame:
        """The page of `to_html`, as the result of a notebook's cell; `height` in pixels."""
        return PageFrame(self.to_html(previews), height)

    @classmethod
    def from_parts(
        cls,
        header: GradientHeader,
        matrices: Sequence[Matrix],
        summary: GradientSummary | None,
        responses: Sequence[gradient_lens_pb2.GradientLensResponse],
    ) -> Gradient:
        """Put together what came one by one."""
        return cls(
            header=header,
            matrices=tuple(matrices),
            summary=summary,
            responses=tuple(responses),
        )
