"""What is read off a whole gradient on request: spectrum, neurons, verification."""

from __future__ import annotations

from dataclasses import dataclass

from januslens._results.components import Entry
from januslens._results.projection import Projection
from januslens._results.tokens import TokenTable
from januslens.v1 import gradient_lens_pb2, lens_pb2


@dataclass(frozen=True, slots=True)
class Singular:
    """One singular direction of a gradient; its sign is arbitrary, so both ends count.

    Attributes:
        value: The singular value.
        explained: Share of the squared Frobenius norm that it holds.
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
    """A neuron's key or value before a step, the step's change, and after.

    Attributes:
        neuron: Its index.
        change_norm: Length of the change, learning rate included where one was given.
        before: The row or column as it is.
        change: What the step adds.
        after: Their sum; None without a learning rate.
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
class Verification:
    """How far the sum of the outer products is from autograd's gradient."""

    relative_error: float
    tolerance: float

    @classmethod
    def from_message(cls, message: gradient_lens_pb2.Verification) -> Verification:
        """Read one comparison."""
        return cls(message.relative_error, message.tolerance)


def _read(present: bool, message: lens_pb2.Projection, tokens: TokenTable) -> Projection | None:
    return Projection.from_message(message, tokens) if present else None
