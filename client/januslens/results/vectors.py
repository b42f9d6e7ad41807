"""Tensors, projections of vectors to the vocabulary, and the results of FindNeurons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from januslens.results.exports import neuron_frame, notebook_html
from januslens.results.models import LayerLevel, Provenance
from januslens.results.tokens import Token, TokenTable
from januslens.v1 import common_pb2, lens_pb2, neurons_pb2

if TYPE_CHECKING:
    import pandas as pd


Floats = NDArray[np.float32]

_LITTLE_ENDIAN: dict[int, str] = {
    common_pb2.DATA_TYPE_FLOAT32: "<f4",
    common_pb2.DATA_TYPE_FLOAT16: "<f2",
    common_pb2.DATA_TYPE_BFLOAT16: "<u2",
    common_pb2.DATA_TYPE_INT64: "<i8",
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as the server sent it, little-endian and row-major.

    Attributes:
        data_type: `float32`, `float16`, `bfloat16` or `int64`.
        shape: Sizes of the axes.
        data: The bytes.
    """

    data_type: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def from_message(cls, message: common_pb2.Tensor) -> Tensor:
        """Read one tensor."""
        name = common_pb2.DataType.Name(message.data_type)
        return cls(name.removeprefix("DATA_TYPE_").lower(), tuple(message.shape), message.data)

    def numpy(self) -> NDArray[np.generic]:
        """Return a copy as an array; bfloat16 becomes float32, because numpy does not support it.

        Raises:
            ValueError: The data type is unknown, or the bytes do not match the shape.
        """
        code = common_pb2.DataType.Value(f"DATA_TYPE_{self.data_type.upper()}")
        if code not in _LITTLE_ENDIAN:
            raise ValueError(f"unknown data type {self.data_type!r} of a tensor; update the client")
        array = np.frombuffer(self.data, dtype=_LITTLE_ENDIAN[code]).reshape(self.shape)
        if code == common_pb2.DATA_TYPE_BFLOAT16:
            # bfloat16 is the upper half of a float32.
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(array.dtype.newbyteorder("="))

    def float32(self) -> Floats:
        """Return a copy in float32."""
        return self.numpy().astype(np.float32)


def tensor_message(vectors: ArrayLike) -> common_pb2.Tensor:
    """Return the message for vectors; all real types except float16 become float32.

    Raises:
        TypeError: The vectors are not real numbers.
    """
    array = np.asarray(vectors)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"invalid data type {array.dtype} of an array; expected real numbers")
    if array.dtype == np.float16:
        code, kept = common_pb2.DATA_TYPE_FLOAT16, array.astype("<f2")
    else:
        with np.errstate(over="ignore"):  # overflow becomes infinity
            code, kept = common_pb2.DATA_TYPE_FLOAT32, array.astype("<f4")
    return common_pb2.Tensor(data_type=code, shape=kept.shape, data=kept.tobytes())


class TokenScore(NamedTuple):
    """One token of a projection.

    Attributes:
        token: The token.
        probability: Its softmax probability, which may underflow to 0.
        logit: Its logit.
        log_probability: Natural logarithm of its probability, which does not underflow.
    """

    token: Token
    probability: float
    logit: float
    log_probability: float


@dataclass(frozen=True, slots=True)
class Projection:
    """The logit lens of one vector (nostalgebraist 2020; VISIT, section 3).

    Attributes:
        top: The tokens with the largest logits, largest first.
        bottom: The tokens with the smallest logits, smallest first.
        entropy_bits: Entropy of the whole distribution.
        target_rank: Number of tokens with a larger logit than the target; 0 = top.
        target_probability: The target's probability.
        target_logit: The target's logit.
        target_log_probability: Natural logarithm of the target's probability.
    """

    top: tuple[TokenScore, ...]
    bottom: tuple[TokenScore, ...]
    entropy_bits: float
    target_rank: int | None = None
    target_probability: float | None = None
    target_logit: float | None = None
    target_log_probability: float | None = None

    @classmethod
    def from_message(cls, message: lens_pb2.Projection, tokens: TokenTable) -> Projection:
        """Read one projection; `tokens` has its texts."""
        has = message.HasField
        normalizer = message.log_normalizer if has("log_normalizer") else math.nan
        return cls(
            _scores(
                message.top_token_ids,
                message.top_probabilities,
                message.top_logits,
                normalizer,
                tokens,
            ),
            _scores(
                message.bottom_token_ids,
                message.bottom_probabilities,
                message.bottom_logits,
                normalizer,
                tokens,
            ),
            message.entropy_bits,
            message.target_rank if has("target_rank") else None,
            message.target_probability if has("target_probability") else None,
            message.target_logit if has("target_logit") else None,
            message.target_logit - normalizer if has("target_logit") else None,
        )

    @property
    def top_tokens(self) -> tuple[Token, ...]:
        """The tokens of `top`, without their scores."""
        return tuple(score.token for score in self.top)

    @property
    def bottom_tokens(self) -> tuple[Token, ...]:
        """The tokens of `bottom`, without their scores."""
        return tuple(score.token for score in self.bottom)

    def __str__(self) -> str:
        """The top tokens, best first."""
        return " ".join(str(token) for token in self.top_tokens)

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)


class Projections(list[Projection]):
    """One projection per vector, in the order of the vectors."""

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)


def _scores(
    ids: Iterable[int],
    probabilities: Iterable[float],
    logits: Sequence[float],
    normalizer: float,
    tokens: TokenTable,
) -> tuple[TokenScore, ...]:
    named = map(tokens.__getitem__, ids)
    logarithms = [logit - normalizer for logit in logits]
    return tuple(map(TokenScore._make, zip(named, probabilities, logits, logarithms, strict=True)))


@dataclass(frozen=True, slots=True)
class NeuronHit:
    """A neuron that promotes or suppresses the token through its value, a row of FF2.

    Attributes:
        layer: Layer of the neuron, from 0.
        neuron: Index of the neuron, from 0; in a mixture of experts, within its expert.
        expert: Expert of the neuron; None if the MLP has no experts.
        rank: Rank of the token in the value's projection, counted from the requested end.
        logit: Logit of the token in the value's projection.
        value: Projection of the value, with the requested token as its target.
    """

    layer: int
    neuron: int
    expert: int | None
    rank: int
    logit: float
    value: Projection

    @classmethod
    def from_message(cls, message: neurons_pb2.NeuronHit, tokens: TokenTable) -> NeuronHit:
        """Read one neuron; `tokens` has the texts of its tokens."""
        return cls(
            layer=message.layer,
            neuron=message.neuron,
            expert=message.expert if message.HasField("expert") else None,
            rank=message.rank,
            logit=message.logit,
            value=Projection.from_message(message.value, tokens),
        )

    def __str__(self) -> str:
        """The neuron's name, for example `L3 neuron 297` or `L3 expert 2 neuron 297`."""
        expert = "" if self.expert is None else f" expert {self.expert}"
        return f"L{self.layer}{expert} neuron {self.neuron}"


@dataclass(frozen=True)
class FoundNeurons:
    """The neurons that promote or suppress a token, sorted by the token's rank, then its logit.

    Attributes:
        token: The requested token.
        suppressed: True if the neurons suppress the token, False if they promote it.
        neurons: The best neurons, up to the requested number, best first.
        total: Number of neurons for which the token's rank is below `depth`.
        depth: Number of tokens per neuron in the server's index.
        provenance: The model's revision, data type, device and library versions.
        limited_layers: The searched layers whose neurons are unknown, and why.
    """

    token: Token
    suppressed: bool
    neurons: tuple[NeuronHit, ...]
    total: int
    depth: int
    provenance: Provenance
    limited_layers: tuple[LayerLevel, ...] = ()

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)

    @classmethod
    def from_messages(
        cls, pages: Sequence[neurons_pb2.FindNeuronsResponse], *, suppressed: bool
    ) -> FoundNeurons:
        """Build the result from the pages of one request; there is at least one page."""
        first = pages[0]
        tokens = TokenTable(token for page in pages for token in page.tokens)
        hits = (hit for page in pages for hit in page.neurons)
        return cls(
            token=tokens[first.token_id],
            suppressed=suppressed,
            neurons=tuple(NeuronHit.from_message(hit, tokens) for hit in hits),
            total=first.total,
            depth=first.depth,
            provenance=Provenance.from_message(first.provenance),
            limited_layers=tuple(LayerLevel.from_message(each) for each in first.limited_layers),
        )

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with one row per neuron, in the same order. Requires pandas."""
        return neuron_frame(self.neurons)
