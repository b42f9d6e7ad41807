"""The gradient of one weight matrix: its components, spectrum, neurons and verification."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from januslens.results import exports
from januslens.results.exports import notebook_html
from januslens.results.kinds import ENDS, MATRIX_KINDS, SIDES, End, MatrixKind, Side
from januslens.results.lazy import LazySequence
from januslens.results.tokens import Token, TokenTable
from januslens.results.vectors import Floats, Projection, Tensor
from januslens.v1 import gradient_lens_pb2, lens_pb2

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Entry:
    """One coordinate of a factor; its index is a neuron, or `head * d_head + dimension`."""

    index: int
    value: float

    @classmethod
    def from_messages(cls, messages: Iterable[gradient_lens_pb2.Coordinate]) -> tuple[Entry, ...]:
        """Read the largest coordinates of a factor, largest first."""
        return tuple(cls(message.index, message.value) for message in messages)


@dataclass(frozen=True, slots=True)
class Component:
    """The part of a gradient from one position, `x_i^T delta_i` (Backward Lens, section 4).

    Attributes:
        position: The position i, an index into the gradient's `prompt_tokens`.
        input_norm: Norm of x_i, the input of the matrix.
        vjp_norm: Norm of delta_i, the gradient of the loss with respect to the matrix's output.
        size: Frobenius norm of the component, the product of both norms.
        promoted_end: The end of `projection` with the tokens that a descent step promotes.
        projection: Projection of the factor that is in the residual basis; None if it is zero.
        predicted_rank: Rank of the model's own prediction in this projection.
        target_ranks: Rank of each target token in this projection; 0 = top.
        other_side: The largest entries of the other factor.
        input: x_i `[d_in]`, if factors were requested.
        vjp: delta_i `[d_out]`, if factors were requested.
        lora_a_vjp: a_i `[rank]` of the matrix's LoRA, `dL/dA = sum_i a_i^T x_i`, likewise.
        lora_b_input: b_i `[rank]`, `dL/dB = sum_i delta_i^T b_i`, likewise.
    """

    position: int
    input_norm: float
    vjp_norm: float
    size: float
    promoted_end: End
    projection: Projection | None
    predicted_rank: int | None
    target_ranks: tuple[int, ...]
    other_side: tuple[Entry, ...]
    input: Tensor | None
    vjp: Tensor | None
    lora_a_vjp: Tensor | None = None
    lora_b_input: Tensor | None = None

    @classmethod
    def from_message(
        cls, message: gradient_lens_pb2.Component, promoted_end: End, tokens: TokenTable
    ) -> Component:
        """Read one component; `tokens` has the texts of its projection."""
        has = message.HasField
        return cls(
            position=message.position,
            input_norm=message.input_norm,
            vjp_norm=message.vjp_norm,
            size=message.size,
            promoted_end=promoted_end,
            projection=Projection.from_message(message.projection, tokens)
            if has("projection")
            else None,
            predicted_rank=message.predicted_rank if has("predicted_rank") else None,
            target_ranks=tuple(message.target_ranks),
            other_side=Entry.from_messages(message.other_side),
            input=Tensor.from_message(message.input) if has("input") else None,
            vjp=Tensor.from_message(message.vjp) if has("vjp") else None,
            lora_a_vjp=Tensor.from_message(message.lora_a_vjp) if has("lora_a_vjp") else None,
            lora_b_input=Tensor.from_message(message.lora_b_input) if has("lora_b_input") else None,
        )

    @property
    def promoted(self) -> tuple[Token, ...]:
        """The tokens that a descent step promotes, strongest first; empty for an input."""
        if self.projection is None or self.promoted_end is End.UNSPECIFIED:
            return ()
        at_top = self.promoted_end is End.TOP
        return self.projection.top_tokens if at_top else self.projection.bottom_tokens

    @property
    def suppressed(self) -> tuple[Token, ...]:
        """The tokens that a descent step suppresses, strongest first; empty for an input."""
        if self.projection is None or self.promoted_end is End.UNSPECIFIED:
            return ()
        at_top = self.promoted_end is End.TOP
        return self.projection.bottom_tokens if at_top else self.projection.top_tokens

    def factors(self) -> tuple[Floats, Floats]:
        """Return x_i `[d_in]` and delta_i `[d_out]` in float32.

        Raises:
            ValueError: The gradient was requested without factors.
        """
        if self.input is None or self.vjp is None:
            raise ValueError("the gradient has no factors; request them with factors=True")
        return self.input.float32(), self.vjp.float32()

    def outer(self) -> Floats:
        """Return this component as a matrix `[d_in, d_out]`.

        Raises:
            ValueError: The gradient was requested without factors.
        """
        return np.outer(*self.factors())


@dataclass(frozen=True, slots=True)
class Singular:
    """One singular value of a gradient with its two vectors, which share an arbitrary sign.

    Attributes:
        value: The singular value.
        explained: Square of the value, divided by the squared Frobenius norm.
        projection: The vector on the residual side, in the vocabulary.
        other_side: The largest entries of the vector on the other side.
    """

    value: float
    explained: float
    projection: Projection | None
    other_side: tuple[Entry, ...]

    @classmethod
    def from_message(cls, message: gradient_lens_pb2.Singular, tokens: TokenTable) -> Singular:
        """Read one singular direction."""
        return cls(
            value=message.value,
            explained=message.explained,
            projection=_read(message.HasField("projection"), message.projection, tokens),
            other_side=Entry.from_messages(message.other_side),
        )


@dataclass(frozen=True, slots=True)
class NeuronChange:
    """The effect of a descent step on one neuron's row or column of a matrix.

    Attributes:
        neuron: Index of the neuron.
        change_norm: Norm of the change; without a learning rate, that of a step with rate 1.
        before: Projection of the row or column before the step.
        change: Projection of the change.
        after: Projection of the row or column after the step; None without a learning rate.
    """

    neuron: int
    change_norm: float
    before: Projection | None
    change: Projection | None
    after: Projection | None

    @classmethod
    def from_message(
        cls, message: gradient_lens_pb2.NeuronChange, tokens: TokenTable
    ) -> NeuronChange:
        """Read one neuron's change."""
        has = message.HasField
        return cls(
            neuron=message.neuron,
            change_norm=message.change_norm,
            before=_read(has("before"), message.before, tokens),
            change=_read(has("change"), message.change, tokens),
            after=_read(has("after"), message.after, tokens),
        )


@dataclass(frozen=True, slots=True)
class LoraGradient:
    """The gradients of the matrices A `[rank, d_in]` and B `[d_out, rank]` of a LoRA.

    Attributes:
        rank: Width between the two matrices.
        scale: Factor of the LoRA, `alpha / rank` or `alpha / sqrt(rank)`.
        a_norm: Frobenius norm of dL/dA.
        b_norm: Frobenius norm of dL/dB.
    """

    rank: int
    scale: float
    a_norm: float
    b_norm: float

    @classmethod
    def from_message(cls, message: gradient_lens_pb2.LoraGradient) -> LoraGradient:
        """Read the gradients of one LoRA."""
        return cls(message.rank, message.scale, message.a_norm, message.b_norm)


@dataclass(frozen=True, slots=True)
class Verification:
    """Relative difference between the sum of outer products and autograd's gradient."""

    relative_error: float
    tolerance: float

    @classmethod
    def from_message(cls, message: gradient_lens_pb2.Verification) -> Verification:
        """Read one comparison."""
        return cls(message.relative_error, message.tolerance)


def kind_of(
    message: gradient_lens_pb2.GradientMatrix | gradient_lens_pb2.SegmentRow,
) -> MatrixKind | str:
    """Return the kind of a matrix, or the name of the module of a linear map."""
    return message.module or MATRIX_KINDS.member(message.kind)


def matrix_name(layer: int, kind: MatrixKind | str, expert: int | None) -> str:
    """Name a matrix: `L3.FF2`, `L3.e1.FF2` in expert 1, or `L3.linear_attn.out_proj`."""
    return f"L{layer}.{kind}" if expert is None else f"L{layer}.e{expert}.{kind}"


def _read(present: bool, message: lens_pb2.Projection, tokens: TokenTable) -> Projection | None:
    return Projection.from_message(message, tokens) if present else None


@dataclass(frozen=True, slots=True, repr=False)
class Matrix:
    """The gradient of one matrix `W: [d_in, d_out]`, `dL/dW = sum_i x_i^T delta_i`.

    Attributes:
        layer: Layer of the matrix.
        kind: Kind of the matrix, or the name of the module of a linear map.
        expert: Expert of the matrix; None without experts.
        d_in: Number of rows of W.
        d_out: Number of columns of W.
        projected_side: The factor that is projected; `UNSPECIFIED` if neither is in the residual
            basis, as between the maps of a state space.
        promoted_end: The end of the projections with the tokens that a descent step promotes.
        components: The largest components, up to the requested number, largest first.
        component_count: Number of components of the whole gradient.
        frobenius_norm: Norm of the whole gradient, including components that were not sent.
        spectrum: The largest singular values with their vectors, if requested.
        neurons: The neurons that a step changes most, if requested.
        verification: The comparison with autograd, if requested.
        lora: The gradients of the LoRA that changes the matrix; None without.
    """

    layer: int
    kind: MatrixKind | str
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
    lora: LoraGradient | None = None

    @classmethod
    def from_message(cls, message: gradient_lens_pb2.GradientMatrix, tokens: TokenTable) -> Matrix:
        """Read one whole matrix; `tokens` has the texts of its projections."""
        end = ENDS.member(message.promoted_end)
        return cls(
            layer=message.layer,
            kind=kind_of(message),
            expert=message.expert if message.HasField("expert") else None,
            d_in=message.d_in,
            d_out=message.d_out,
            projected_side=SIDES.member(message.projected_side),
            promoted_end=end,
            components=LazySequence.of(
                message.components, lambda c: Component.from_message(c, end, tokens)
            ),
            component_count=message.component_count,
            frobenius_norm=message.frobenius_norm,
            spectrum=LazySequence.of(message.spectrum, lambda s: Singular.from_message(s, tokens)),
            neurons=LazySequence.of(
                message.neurons, lambda n: NeuronChange.from_message(n, tokens)
            ),
            verification=Verification.from_message(message.verification)
            if message.HasField("verification")
            else None,
            lora=LoraGradient.from_message(message.lora) if message.HasField("lora") else None,
        )

    @property
    def name(self) -> str:
        """The matrix's name, for example `L3.FF2`, or `L3.e1.FF2` in expert 1."""
        return matrix_name(self.layer, self.kind, self.expert)

    def factors(self) -> tuple[Floats, Floats]:
        """Return the inputs `[components, d_in]` and the VJPs `[components, d_out]` in float32.

        Raises:
            ValueError: The gradient was requested without factors.
        """
        if not self.components:  # the gradient is zero
            return np.zeros((0, self.d_in), np.float32), np.zeros((0, self.d_out), np.float32)
        inputs, vjps = zip(*(component.factors() for component in self.components), strict=True)
        return np.stack(inputs), np.stack(vjps)

    def gradient(self) -> Floats:
        """Return the dense gradient `[d_in, d_out]`.

        Raises:
            ValueError: The gradient was requested without factors, or without all components.
        """
        inputs, vjps = self.factors()
        self._check_complete()
        dense: Floats = inputs.T @ vjps
        return dense

    def lora_gradients(self) -> tuple[Floats, Floats]:
        """Return the dense gradients dL/dA `[rank, d_in]` and dL/dB `[d_out, rank]` of the LoRA.

        Raises:
            ValueError: No LoRA changes the matrix, or the gradient was requested without factors or
                without all components.
        """
        if self.lora is None:
            raise ValueError(f"no LoRA changes {self.name}")
        inputs, vjps = self.factors()
        self._check_complete()
        a_vjps, b_inputs = (
            np.array([t.float32() for t in column if t is not None], np.float32)
            for column in (
                [component.lora_a_vjp for component in self.components],
                [component.lora_b_input for component in self.components],
            )
        )
        shape = (len(inputs), self.lora.rank)
        a: Floats = a_vjps.reshape(shape).T @ inputs
        b: Floats = vjps.T @ b_inputs.reshape(shape)
        return a, b

    def _check_complete(self) -> None:
        if len(self.components) < self.component_count:
            raise ValueError(
                f"{self.name} has only {len(self.components)} of {self.component_count} "
                "components; request all of them with components=0"
            )

    def __repr__(self) -> str:
        """A one-line description, because the matrix may have thousands of projections."""
        parts = f"{len(self.components)} of {self.component_count} components"
        return f"<Matrix {self.name} [{self.d_in}, {self.d_out}]: {parts}>"

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with one row per component. Requires pandas."""
        return exports.component_frame([self], ())

    def save_factors(self, path: str | PathLike[str]) -> None:
        """Write the factors to a safetensors file. Requires safetensors.

        The file has `L3.FF2.input` `[components, d_in]`, `L3.FF2.vjp` `[components, d_out]` and
        `L3.FF2.position` `[components]`.

        Raises:
            ValueError: The gradient was requested without factors.
        """
        exports.save_factors([self], path, {})
