"""The contract's enumerations as strings: they print, sort and compare as what they say."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Generic, Self, TypeVar

from januslens.v1 import gradient_lens_pb2, lens_pb2, trace_pb2


class Kind(StrEnum):
    """An enumeration of the contract, its members without the prefix of the .proto file."""

    @classmethod
    def of(cls, name: str) -> Self:
        """The member of this name, whatever its case.

        Raises:
            ValueError: There is none; the message lists all.
        """
        try:
            return cls[name.upper()]
        except KeyError:
            known = ", ".join(member.name for member in cls)
            raise ValueError(f"expected one of {known}; got {name!r}") from None


KindT = TypeVar("KindT", bound=Kind)
NumberT = TypeVar("NumberT", bound=int)


class NodeKind(Kind):
    """Kinds of flow-graph nodes; docs/semantics.md gives the vector of each."""

    UNSPECIFIED = "UNSPECIFIED"
    BLOCK_INPUT = "BLOCK_INPUT"
    ATTENTION_INPUT = "ATTENTION_INPUT"
    QUERY = "QUERY"
    KEY = "KEY"
    VALUE = "VALUE"
    HEAD_QUERY = "HEAD_QUERY"
    HEAD_KEY = "HEAD_KEY"
    HEAD_VALUE = "HEAD_VALUE"
    MEMORY_KEY = "MEMORY_KEY"
    MEMORY_VALUE = "MEMORY_VALUE"
    HEAD_OUTPUT = "HEAD_OUTPUT"
    ATTENTION_CONCAT = "ATTENTION_CONCAT"
    ATTENTION_NEURON = "ATTENTION_NEURON"
    ATTENTION_BIAS = "ATTENTION_BIAS"
    ATTENTION_SUM = "ATTENTION_SUM"
    ATTENTION_OUTPUT = "ATTENTION_OUTPUT"
    RESIDUAL_MID = "RESIDUAL_MID"
    MLP_INPUT = "MLP_INPUT"
    MLP_KEY = "MLP_KEY"
    MLP_UP = "MLP_UP"
    MLP_VALUE = "MLP_VALUE"
    MLP_BIAS = "MLP_BIAS"
    MLP_SUM = "MLP_SUM"
    MLP_OUTPUT = "MLP_OUTPUT"
    BLOCK_OUTPUT = "BLOCK_OUTPUT"
    FINAL_NORM = "FINAL_NORM"
    PREDICTION = "PREDICTION"
    OTHER = "OTHER"


class EdgeKind(Kind):
    """Kinds of flow-graph edges; only PART edges carry shares."""

    UNSPECIFIED = "UNSPECIFIED"
    PART = "PART"
    NORM = "NORM"
    PROJECT = "PROJECT"
    SPLIT = "SPLIT"
    ATTEND = "ATTEND"
    RECALL = "RECALL"
    ACTIVATE = "ACTIVATE"
    SCALE = "SCALE"
    GAP = "GAP"


class MatrixKind(Kind):
    """The weight matrices of a block, as maps `y = x W` with `W: [d_in, d_out]`."""

    UNSPECIFIED = "UNSPECIFIED"
    Q = "Q"
    K = "K"
    V = "V"
    O = "O"  # noqa: E741 - the field's name for the output projection
    FF1 = "FF1"
    GATE = "GATE"
    UP = "UP"
    FF2 = "FF2"


class Lens(Kind):
    """How a vector is brought into the vocabulary."""

    UNSPECIFIED = "UNSPECIFIED"
    FINAL_NORM = "FINAL_NORM"
    NORMALIZED = "NORMALIZED"
    RAW = "RAW"


class Side(Kind):
    """Which factor of a gradient lives in the residual basis and is projected."""

    UNSPECIFIED = "UNSPECIFIED"
    INPUT = "INPUT"
    VJP = "VJP"


class End(Kind):
    """Where in a projection the tokens stand that a descent step promotes."""

    UNSPECIFIED = "UNSPECIFIED"
    TOP = "TOP"
    BOTTOM = "BOTTOM"


class Numbering(Generic[KindT, NumberT]):
    """The numbers that the contract gives to the members of a kind."""

    def __init__(
        self, kind: type[KindT], items: Iterable[tuple[str, NumberT]], prefix: str
    ) -> None:
        """`items` are a generated enum's; their names start with `prefix`."""
        short = {name.removeprefix(prefix): number for name, number in items}
        self._numbers = {member: short[member.name] for member in kind if member.name in short}
        self._members: dict[int, KindT] = {n: member for member, n in self._numbers.items()}

    def member(self, number: int) -> KindT:
        """The member; UNSPECIFIED (number 0) for one that only a newer server knows."""
        return self._members.get(number) or self._members[0]

    def number(self, member: KindT) -> NumberT:
        """What to send for a member."""
        return self._numbers[member]


NODE_KINDS = Numbering(NodeKind, trace_pb2.NodeKind.items(), "NODE_KIND_")
EDGE_KINDS = Numbering(EdgeKind, trace_pb2.EdgeKind.items(), "EDGE_KIND_")
MATRIX_KINDS = Numbering(MatrixKind, gradient_lens_pb2.MatrixKind.items(), "MATRIX_KIND_")
LENSES = Numbering(Lens, lens_pb2.Lens.items(), "LENS_")
SIDES = Numbering(Side, gradient_lens_pb2.Side.items(), "SIDE_")
ENDS = Numbering(End, gradient_lens_pb2.End.items(), "END_")
