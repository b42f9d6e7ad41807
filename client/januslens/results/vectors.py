"""Vectors and their projections into the vocabulary, and neurons found by them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from januslens.results.exports import neuron_frame, notebook_html
from januslens.results.models import Provenance
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
    """Numbers as the server sent them: little-endian, row-major.

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
        """A copy as an array; bfloat16, which numpy does not know, becomes float32.

        Raises:
            ValueError: The data type is unknown, or the bytes don't fill the shape.
        """
        code = common_pb2.DataType.Value(f"DATA_TYPE_{self.data_type.upper()}")
        if code not in _LITTLE_ENDIAN:
            raise ValueError(f"expected a tensor of a known data type, got {self.data_type!r}")
        array = np.frombuffer(self.data, dtype=_LITTLE_ENDIAN[code]).reshape(self.shape)
        if code == common_pb2.DATA_TYPE_BFLOAT16:
            # bfloat16 is the upper half of a float32.
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(array.dtype.newbyteorder("="))

    def float32(self) -> Floats:
        """The same numbers in float32."""
        return self.numpy().astype(np.float32)


def tensor_message(vectors: ArrayLike) -> common_pb2.Tensor:
    """`vectors` as a message: float16 stays, every other real type becomes float32.

    Raises:
        TypeError: They are not real numbers.
    """
    array = np.asarray(vectors)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"expected real numbers, got an array of {array.dtype}")
    if array.dtype == np.float16:
        code, kept = common_pb2.DATA_TYPE_FLOAT16, array.astype("<f2")
    else:
        with np.errstate(over="ignore"):  # what overflows becomes infinite
            code, kept = common_pb2.DATA_TYPE_FLOAT32, array.astype("<f4")
    return common_pb2.Tensor(data_type=code, shape=kept.shape, data=kept.tobytes())


class TokenScore(NamedTuple):
    """One token of a projection."""

    token: Token
    probability: float
    logit: float


@dataclass(frozen=True, slots=True)
class Projection:
    """The logit lens of one vector (nostalgebraist 2020; VISIT, section 3).

    Attributes:
        top: The tokens with the largest logits, largest first.
        bottom: The tokens with the smallest logits, smallest first.
        entropy_bits: Entropy of the whole distribution.
        target_rank: How many tokens have a larger logit than the target: 0 = it is the top one.
        target_probability: The target's probability.
        target_logit: The target's logit.
    """

    top: tuple[TokenScore, ...]
    bottom: tuple[TokenScore, ...]
    entropy_bits: float
    target_rank: int | None = None
    target_probability: float | None = None
    target_logit: float | None = None

    @classmethod
    def from_message(cls, message: lens_pb2.Projection, tokens: TokenTable) -> Projection:
        """Read one projection, its texts from `tokens`."""
        has = message.HasField
        return cls(
            _scores(message.top_token_ids, message.top_probabilities, message.top_logits, tokens),
            _scores(
                message.bottom_token_ids,
                message.bottom_probabilities,
                message.bottom_logits,
                tokens,
            ),
            message.entropy_bits,
            message.target_rank if has("target_rank") else None,
            message.target_probability if has("target_probability") else None,
            message.target_logit if has("target_logit") else None,
        )

    @property
    def top_tokens(self) -> tuple[Token, ...]:
        """The tokens of `top` alone."""
        return tuple(score.token for score in self.top)

    @property
    def bottom_tokens(self) -> tuple[Token, ...]:
        """The tokens of `bottom` alone."""
        return tuple(score.token for score in self.bottom)

    def __str__(self) -> str:
        """The top tokens, best first."""
        return " ".join(str(token) for token in self.top_tokens)

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)


class Projections(list[Projection]):
    """One projection a vector, in the order of the vectors."""

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)


def _scores(
    ids: Iterable[int], probabilities: Iterable[float], logits: Iterable[float], tokens: TokenTable
) -> tuple[TokenScore, ...]:
    named = map(tokens.__getitem__, ids)
    return tuple(map(TokenScore._make, zip(named, probabilities, logits, strict=True)))


@dataclass(frozen=True, slots=True)
class NeuronHit:
    """A neuron whose value, its row of FF2, promotes or suppresses the token.

    Attributes:
        layer: Its block, from 0.
        neuron: The neuron, from 0; in a mixture of experts, within its expert.
        expert: The expert of the neuron; None if the MLP has no experts.
        rank: Rank of the token in the value, from the requested end; 0 = first.
        logit: Logit of the token in the value.
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
        """Read one neuron, the texts of its tokens from `tokens`."""
        return cls(
            layer=message.layer,
            neuron=message.neuron,
            expert=message.expert if message.HasField("expert") else None,
            rank=message.rank,
            logit=message.logit,
            value=Projection.from_message(message.value, tokens),
        )

    def __str__(self) -> str:
        """`L3 neuron 297`, or `L3 expert 2 neuron 297`."""
        expert = "" if self.expert is None else f" expert {self.expert}"
        return f"L{self.layer}{expert} neuron {self.neuron}"


@dataclass(frozen=True)
class FoundNeurons:
    """The neurons whose values promote or suppress a token, sorted by its rank, then its logit.

    Attributes:
        token: The requested token.
        suppressed: True if the neurons suppress the token, False if they promote it.
        neurons: At most the requested number of neurons, the best first.
        total: Number of neurons in which the token's rank is below `depth`.
        depth: Number of tokens that the server's index has for each value.
        provenance: The model's revision, data type, device and library versions.
    """

    token: Token
    suppressed: bool
    neurons: tuple[NeuronHit, ...]
    total: int
    depth: int
    provenance: Provenance

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
        )

    def to_pandas(self) -> pd.DataFrame:
        """A data frame with one row per neuron, in the same order."""
        return neuron_frame(self.neurons)
