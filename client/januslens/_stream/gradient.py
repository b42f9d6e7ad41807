"""Putting a GradientLens together."""

from __future__ import annotations

from januslens._results.gradient import Gradient
from januslens._results.gradient_events import GradientHeader, GradientSummary
from januslens._results.kinds import MATRIX_KINDS
from januslens._results.matrices import Matrix
from januslens._stream.assembler import Assembler
from januslens.errors import GradientInterrupted
from januslens.v1 import gradient_lens_pb2

GradientEvent = GradientHeader | Matrix | GradientSummary


class GradientAssembler(Assembler[gradient_lens_pb2.GradientLensResponse, GradientEvent, Gradient]):
    """Joins the messages of a GradientLens into its header, matrices and summary."""

    interrupted = GradientInterrupted

    def __init__(self) -> None:
        super().__init__()
        self._header: gradient_lens_pb2.GradientHeader | None = None
        self._matrices: list[Matrix] = []
        self._summary: GradientSummary | None = None
        self._pending: gradient_lens_pb2.GradientMatrix | None = None

    def partial(self) -> Gradient | None:
        """The matrices that are complete so far; None before the header."""
        if self._header is None:
            return None
        # Read again at the end: a target's text may have come with a later matrix.
        header = GradientHeader.from_message(self._header, self.tokens)
        return Gradient.from_parts(header, self._matrices, self._summary, self.responses)

    @property
    def complete(self) -> bool:
        """Whether the summary has come."""
        return self._summary is not None

    def _read(self, response: gradient_lens_pb2.GradientLensResponse) -> GradientEvent | None:
        match response.WhichOneof("event"):
            case "header":
                return self._read_header(response.header)
            case "matrix":
                return self._read_matrix(response.matrix)
            case "summary":
                return self._read_summary(response.summary)
            case _:  # an event of a newer server's
                return None

    def _read_header(self, message: gradient_lens_pb2.GradientHeader) -> GradientHeader:
        self._header = message
        self.request_id = message.request_id
        self.tokens.add(message.prompt_tokens)
        self.tokens.add(message.tokens)
        return GradientHeader.from_message(message, self.tokens)

    def _read_matrix(self, message: gradient_lens_pb2.GradientMatrix) -> Matrix | None:
        self.tokens.add(message.tokens)
        if self._pending is None:
            self._pending = gradient_lens_pb2.GradientMatrix()
        elif _which(self._pending) != _which(message):
            raise self.violation(
                f"expected the rest of {_which(self._pending)}; got {_which(message)}"
            )
        self._pending.MergeFrom(message)
        if not message.last:
            return None
        matrix = Matrix.from_message(self._pending, self.tokens)
        self._pending = None
        self._matrices.append(matrix)
        return matrix

    def _read_summary(self, message: gradient_lens_pb2.GradientSummary) -> GradientSummary:
        if self._pending is not None:
            raise self.violation(f"expected the rest of {_which(self._pending)}; got the end")
        self._summary = GradientSummary.from_message(message)
        return self._summary


def _which(message: gradient_lens_pb2.GradientMatrix) -> str:
    expert = f".e{message.expert}" if message.HasField("expert") else ""
    return f"L{message.layer}{expert}.{MATRIX_KINDS.member(message.kind)}"
