"""The gradient of one weight matrix, factorised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from januslens._notebook.gradients import matrix_html
from januslens._results import gradient_files, gradient_frames
from januslens._results.components import Component
from januslens._results.kinds import ENDS, MATRIX_KINDS, SIDES, End, MatrixKind, Side
from januslens._results.late import Late
from januslens._results.matrix_readings import NeuronChange, Singular, Verification
from januslens._results.tensors import Floats
from januslens._results.tokens import TokenTable
from januslens.v1 import gradient_lens_pb2

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, repr=False)
class Matrix:
    """`dL/dW = sum_i x_i^T delta_i` of one weight `W: [d_in, d_out]`.

    Attributes:
        layer: Its block.
        kind: Which matrix.
        expert: Which expert's.
        d_in: Rows.
        d_out: Columns.
        projected_side: The factor that is read in the vocabulary.
        promoted_end: Where the tokens stand there that a descent step promotes.
        components: The factor pairs, largest first, as many as were asked for.
        component_count: How many pairs the whole gradient has.
        frobenius_norm: Norm of the whole gradient, left-out components included.
        spectrum: The largest singular values and their directions, where asked for.
        neurons: The neurons that a step moves most, where asked for.
        verification: The comparison with autograd, where asked for.
    """

    layer: int
    kind: MatrixKind
    expert: int | None
    d_in: int
    d_out: int
    projected_side: Side
    promoted_end: End
    components: Sequence[Component]
    component_count: int
    frobenius_norm: float
    spectrum: Sequence[Singular]
    neurons: Sequence[NeuronChange]
    verification: Verification | None

    @classmethod
    def from_message(cls, message: gradient_lens_pb2.GradientMatrix, tokens: TokenTable) -> Matrix:
        """Read one whole matrix, the texts of its projections from `tokens`."""
        end = ENDS.member(message.promoted_end)
        return cls(
            layer=message.layer,
            kind=MATRIX_KINDS.member(message.kind),
            expert=message.expert if message.HasField("expert") else None,
            d_in=message.d_in,
            d_out=message.d_out,
            projected_side=SIDES.member(message.projected_side),
            promoted_end=end,
            components=Late.of(
                message.components, lambda c: Component.from_message(c, end, tokens)
            ),
            component_count=message.component_count,
            frobenius_norm=message.frobenius_norm,
            spectrum=Late.of(message.spectrum, lambda s: Singular.from_message(s, tokens)),
            neurons=Late.of(message.neurons, lambda n: NeuronChange.from_message(n, tokens)),
            verification=Verification.from_message(message.verification)
            if message.HasField("verification")
            else None,
        )

    @property
    def name(self) -> str:
        """`L3.FF2`, or `L3.e1.FF2` for an expert's."""
        expert = "" if self.expert is None else f"e{self.expert}."
        return f"L{self.layer}.{expert}{self.kind}"

    def factors(self) -> tuple[Floats, Floats]:
        """The inputs `[components, d_in]` and the VJPs `[components, d_out]` in float32.

        Raises:
            ValueError: The gradient was made without factors.
        """
        if not self.components:  # the gradient is zero
            return np.zeros((0, self.d_in), np.float32), np.zeros((0, self.d_out), np.float32)
        inputs, vjps = zip(*(component.factors() for component in self.components), strict=True)
        return np.stack(inputs), np.stack(vjps)

    def gradient(self) -> Floats:
        """The dense gradient `[d_in, d_out]`.

        Raises:
            ValueError: The gradient was made without factors, or without all components.
        """
        inputs, vjps = self.factors()
        if len(self.components) < self.component_count:
            raise ValueError(
                f"{self.name} has only its {len(self.components)} largest of "
                f"{self.component_count} components here, and the dense gradient is the sum of "
                "all: ask for them with components=0"
            )
        dense: Floats = inputs.T @ vjps
        return dense

    def __repr__(self) -> str:
        """One line: it may hold thousands of projections."""
        parts = f"{len(self.components)} of {self.component_count} components"
        return f"<Matrix {self.name} [{self.d_in}, {self.d_out}]: {parts}>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return matrix_html(self)

    def to_pandas(self) -> pd.DataFrame:
        """One row a component. Needs pandas."""
        return gradient_frames.component_frame([self], ())

    def save(self, path: str | Path) -> None:
        """Write the factors to a safetensors file. Needs safetensors.

        It holds `L3.FF2.input` `[components, d_in]`, `L3.FF2.vjp` `[components, d_out]` and
        `L3.FF2.position` `[components]`.

        Raises:
            ValueError: The gradient was made without factors.
        """
        gradient_files.save([self], path, {})
