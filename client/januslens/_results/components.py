"""One factor pair of a gradient, and what a step along it would promote."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from januslens._results.kinds import End
from januslens._results.projection import Projection
from januslens._results.tensors import Floats, Tensor
from januslens._results.tokens import Token, TokenTable
from januslens.v1 import gradient_lens_pb2


@dataclass(frozen=True, slots=True)
class Entry:
    """One coordinate of a factor: a neuron, or head * d_head + dimension."""

    index: int
    value: float

    @classmethod
    def from_messages(cls, messages: Iterable[gradient_lens_pb2.Entry]) -> tuple[Entry, ...]:
        """Read the largest coordinates of a factor, largest first."""
        return tuple(cls(message.index, message.value) for message in messages)


@dataclass(frozen=True, slots=True)
class Component:
    """`x_i^T delta_i`: what one position adds to a gradient (Backward Lens, section 4).

    Attributes:
        position: The position i, an index into the gradient's `prompt_tokens`.
        input_norm: Length of x_i, what the matrix read there.
        vjp_norm: Length of delta_i, the gradient of the loss with respect to what it wrote.
        size: Their product: the norm of this component.
        promoted_end: Where in `projection` the tokens stand that a descent step promotes.
        projection: The factor that lives in the residual basis, in the vocabulary.
        predicted_rank: Rank in it of the model's own answer to the prompt.
        target_ranks: Rank in it of every target token, 0 = the very top.
        other_side: The largest entries of the other factor.
        input: x_i `[d_in]`, where factors were asked for.
        vjp: delta_i `[d_out]`, likewise.
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

    @classmethod
    def from_message(
        cls, message: gradient_lens_pb2.Component, promoted_end: End, tokens: TokenTable
    ) -> Component:
        """Read one component, the texts of its projection from `tokens`."""
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
        """x_i `[d_in]` and delta_i `[d_out]` in float32.

        Raises:
            ValueError: The gradient was made without factors.
        """
        if self.input is None or self.vjp is None:
            raise ValueError("no factors here: ask for them with factors=True")
        return self.input.float32(), self.vjp.float32()

    def outer(self) -> Floats:
        """This component as a matrix `[d_in, d_out]`.

        Raises:
            ValueError: The gradient was made without factors.
        """
        return np.outer(*self.factors())
