"""The enumerations of the contract as Python string enumerations."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Generic, Self, TypeVar

from januslens.v1 import gradient_lens_pb2, lens_pb2, sites_pb2, trace_pb2


class Kind(StrEnum):
    """An enumeration of the contract; members lack the prefix that they have in the .proto file."""

    @classmethod
    def of(cls, name: str) -> Self:
        """Return the member with this name, in upper or lower case.

        Raises:
            ValueError: There is no such member; the message lists all members.
        """
        try:
            return cls[name.upper()]
        except KeyError:
            known = ", ".join(member.name for member in cls if member.name != "UNSPECIFIED")
            raise ValueError(f"unknown value {name!r}; expected one of {known}") from None


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
    MIXER_OUTPUT = "MIXER_OUTPUT"
    MIXER_HEAD = "MIXER_HEAD"


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
    """The weight matrices of a block, as maps `y = x W` with `W: [d_in, d_out]`.

    `MODULE` is never the kind of a result: the kind of a linear map that a request named by its
    module is the module's name.
    """

    UNSPECIFIED = "UNSPECIFIED"
    Q = "Q"
    K = "K"
    V = "V"
    O = "O"  # noqa: E741 - the field's name for the output projection
    FF1 = "FF1"
    GATE = "GATE"
    UP = "UP"
    FF2 = "FF2"
    MODULE = "MODULE"


class Lens(Kind):
    """Variants of the logit lens; docs/semantics.md defines them."""

    UNSPECIFIED = "UNSPECIFIED"
    FINAL_NORM = "FINAL_NORM"
    NORMALIZED = "NORMALIZED"
    RAW = "RAW"


class Criterion(Kind):
    """Scores by which heads, sources and neurons are selected; docs/semantics.md defines them."""

    UNSPECIFIED = "UNSPECIFIED"
    VISIT = "VISIT"
    CONTRIBUTION = "CONTRIBUTION"
    ATTRIBUTION = "ATTRIBUTION"


class Site(Kind):
    """Places in the forward pass whose tensors are read; docs/semantics.md defines each."""

    UNSPECIFIED = "UNSPECIFIED"
    EMBEDDING = "EMBEDDING"
    ATTENTION_INPUT = "ATTENTION_INPUT"
    QUERY = "QUERY"
    KEY = "KEY"
    VALUE = "VALUE"
    ATTENTION_PATTERN = "ATTENTION_PATTERN"
    HEAD_RESULT = "HEAD_RESULT"
    ATTENTION_OUTPUT = "ATTENTION_OUTPUT"
    RESIDUAL_MID = "RESIDUAL_MID"
    MLP_INPUT = "MLP_INPUT"
    NEURONS = "NEURONS"
    ROUTER = "ROUTER"
    MLP_OUTPUT = "MLP_OUTPUT"
    BLOCK_OUTPUT = "BLOCK_OUTPUT"
    FINAL_NORM = "FINAL_NORM"
    LOGITS = "LOGITS"
    MIXER_OUTPUT = "MIXER_OUTPUT"


class Side(Kind):
    """The factor of a gradient that is in the residual basis and is projected."""

    UNSPECIFIED = "UNSPECIFIED"
    INPUT = "INPUT"
    VJP = "VJP"


class End(Kind):
    """The end of a projection with the tokens that a descent step promotes."""

    UNSPECIFIED = "UNSPECIFIED"
    TOP = "TOP"
    BOTTOM = "BOTTOM"


class Numbering(Generic[KindT, NumberT]):
    """Converts between the members of a kind and the enum numbers of the contract."""

    def __init__(
        self, kind: type[KindT], items: Iterable[tuple[str, NumberT]], prefix: str
    ) -> None:
        """`items` are those of a generated enum, with names that start with `prefix`."""
        short = {name.removeprefix(prefix): number for name, number in items}
        self._numbers = {member: short[member.name] for member in kind if member.name in short}
        self._members: dict[int, KindT] = {n: member for member, n in self._numbers.items()}

    def member(self, number: int) -> KindT:
        """Return the member; UNSPECIFIED (number 0) for numbers of a newer contract."""
        return self._members.get(number) or self._members[0]

    def number(self, member: KindT) -> NumberT:
        """Return the enum number of a member."""
        return self._numbers[member]


NODE_KINDS = Numbering(NodeKind, trace_pb2.NodeKind.items(), "NODE_KIND_")
EDGE_KINDS = Numbering(EdgeKind, trace_pb2.EdgeKind.items(), "EDGE_KIND_")
MATRIX_KINDS = Numbering(MatrixKind, gradient_lens_pb2.MatrixKind.items(), "MATRIX_KIND_")
CRITERIA = Numbering(Criterion, trace_pb2.SelectionCriterion.items(), "SELECTION_CRITERION_")
LENSES = Numbering(Lens, lens_pb2.Lens.items(), "LENS_")
SITES = Numbering(Site, sites_pb2.Site.items(), "SITE_")
SIDES = Numbering(Side, gradient_lens_pb2.GradientFactor.items(), "GRADIENT_FACTOR_")
ENDS = Numbering(End, gradient_lens_pb2.RankingEnd.items(), "RANKING_END_")
