"""Values that several results share: arrays, kinds, tokens, projections, model sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


class NodeKind(IntEnum):
    """Kinds of flow-graph nodes, defined in docs/semantics.md; numbers as in `trace.proto`."""

    BLOCK_INPUT = 1
    ATTENTION_INPUT = 2
    QUERY = 3
    KEY = 4
    VALUE = 5
    HEAD_QUERY = 6
    HEAD_KEY = 7
    HEAD_VALUE = 8
    MEMORY_KEY = 9
    MEMORY_VALUE = 10
    HEAD_OUTPUT = 11
    ATTENTION_CONCAT = 12
    ATTENTION_NEURON = 13
    ATTENTION_BIAS = 14
    ATTENTION_SUM = 15
    ATTENTION_OUTPUT = 16
    RESIDUAL_MID = 17
    MLP_INPUT = 18
    MLP_KEY = 19
    MLP_UP = 20
    MLP_VALUE = 21
    MLP_BIAS = 22
    MLP_SUM = 23
    MLP_OUTPUT = 24
    BLOCK_OUTPUT = 25
    FINAL_NORM = 26
    PREDICTION = 27
    OTHER = 28
    MIXER_OUTPUT = 29
    MIXER_HEAD = 30


class EdgeKind(IntEnum):
    """Kinds of flow-graph edges; numbers as in `trace.proto`."""

    PART = 1
    NORM = 2
    PROJECT = 3
    SPLIT = 4
    ATTEND = 5
    RECALL = 6
    ACTIVATE = 7
    SCALE = 8
    GAP = 9


class MatrixKind(IntEnum):
    """Weight matrices of a block; numbers as in `gradient_lens.proto`.

    MODULE is a linear map that requests name by its module.
    """

    Q = 1
    K = 2
    V = 3
    O = 4  # noqa: E741 - the field's name for the output projection
    FF1 = 5
    GATE = 6
    UP = 7
    FF2 = 8
    MODULE = 9


# The kinds that a request can name.
NAMED_KINDS = tuple(kind for kind in MatrixKind if kind is not MatrixKind.MODULE)


class Side(IntEnum):
    """The factor of a gradient that is in the residual basis and is projected."""

    INPUT = 1
    VJP = 2


class End(IntEnum):
    """The end of a projection with the tokens that a descent step promotes."""

    UNSPECIFIED = 0
    TOP = 1
    BOTTOM = 2


class Token(NamedTuple):
    """A vocabulary entry, with the characters `start` to `end` that it covers in a text, if any.

    In a conversation these are characters of the content of the message with index `message`.
    """

    id: int
    text: str
    raw: bytes
    start: int | None = None
    end: int | None = None
    message: int | None = None


@dataclass(frozen=True)
class ProjectionTable:
    """The projections of n vectors.

    Fields of the top are `[n, top_k]`, largest logit first. Those of the bottom are `[n,
    bottom_k]`, smallest logit first. Those of the m targets are `[n, m]`; rank 0 is the top. All
    others are `[n]`. `projected` is False for vectors that are exactly zero, which are not
    projected.
    """

    projected: Flags
    top_ids: Ints
    top_logits: Floats
    top_probabilities: Floats
    bottom_ids: Ints
    bottom_logits: Floats
    bottom_probabilities: Floats
    entropy_bits: Floats
    log_normalizers: Floats
    target_ids: Ints
    target_ranks: Ints
    target_logits: Floats
    target_probabilities: Floats

    def rows(self, where: slice | Ints) -> ProjectionTable:
        """Return some of the rows."""
        return ProjectionTable(**{name: column[where] for name, column in vars(self).items()})


@dataclass(frozen=True)
class StageTime:
    """Seconds that a stage of the request took."""

    stage: str
    seconds: float


@dataclass(frozen=True)
class Provenance:
    """The model, device and library versions that computed a result."""

    model: str
    revision: str
    architecture: str
    data_type: str
    device: str
    attention: str
    versions: Mapping[str, str]
    quantization: str = ""
    lora: str = ""


@dataclass(frozen=True)
class Guarantee:
    """A measured property of a model, with its tolerance."""

    name: str
    measured_error: float
    tolerance: float

    @property
    def held(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return self.measured_error <= self.tolerance

    @property
    def failure(self) -> str:
        """The measured error and the tolerance as a text, for a property that did not hold."""
        return (
            f"self-check {self.name} failed: error {self.measured_error:.3g}, expected at most "
            f"{self.tolerance:g}"
        )


class Level(IntEnum):
    """How much of a layer can be shown; numbers as in `common.proto`."""

    STREAM = 1
    SUBLAYERS = 2
    PARTS = 3


class SublayerKind(IntEnum):
    """What a sublayer is; numbers as in `common.proto`."""

    ATTENTION = 1
    LINEAR_ATTENTION = 2
    STATE_SPACE = 3
    CONVOLUTION = 4
    MLP = 5
    EXPERTS = 6
    OTHER = 7


class LinearMap(NamedTuple):
    """A linear map `[d_in, d_out]` with the name of its module in the block."""

    module: str
    d_in: int
    d_out: int


class LayerLevel(NamedTuple):
    """The level of a layer; `reason` says why it is not PARTS, and is empty otherwise.

    `sublayers` are the names and kinds of the sublayers at the level SUBLAYERS. `linear_maps` are
    those of `ModelView.levels`, and empty elsewhere.
    """

    layer: int
    level: Level
    reason: str = ""
    sublayers: tuple[tuple[str, SublayerKind], ...] = ()
    linear_maps: tuple[LinearMap, ...] = ()


@dataclass(frozen=True)
class ModelFacts:
    """The sizes of a model; the names are those of the contract.

    Sizes of heads, neurons and experts are 0 if no layer shows them. The residual stream has
    `n_streams` vectors of width `d_model` at each position, side by side.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    n_experts: int
    vocab_size: int
    max_positions: int
    n_streams: int = 1

    @property
    def stream_width(self) -> int:
        """The width of the residual stream: that of the vectors of all streams together."""
        return self.n_streams * self.d_model
