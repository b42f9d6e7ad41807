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
        """Read the pages of one request, at least one."""
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
