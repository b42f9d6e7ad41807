"""Neurons that write a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from januslens._results.exports import neuron_frame
from januslens._results.models import Provenance
from januslens._results.rendering import notebook_html
from januslens._results.tokens import Token, TokenTable
from januslens._results.vectors import Projection
from januslens.v1 import neurons_pb2

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class NeuronHit:
    """A neuron whose value, its row of FF2, promotes or suppresses the token.

    Attributes:
        layer: Its block, from 0.
        neuron: Its number, of a mixture within its expert.
        expert: The expert that it belongs to; None = a plain MLP.
        rank: How many tokens the value puts before the one asked for, from the end asked for.
        logit: The token's logit in the value.
        value: The value in the vocabulary, the token asked for being its target.
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
    """The neurons whose values write a token, by its rank in them, then by its logit.

    Attributes:
        token: The token that was asked for.
        suppressed: Whether those were asked for that push it to the bottom.
        neurons: As many as were asked for, the best first.
        total: How many there are.
        depth: How deep each value was searched: `total` counts the ranks below it.
        provenance: Which weights they are of.
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
        """Read the pages of one question, at least one."""
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
        """A frame with one row a neuron, in their order."""
        return neuron_frame(self.neurons)
