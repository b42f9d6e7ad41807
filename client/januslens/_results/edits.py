"""What an edit would do."""

from __future__ import annotations

from dataclasses import dataclass, field

from januslens._results.models import Provenance
from januslens._results.rendering import notebook_html
from januslens._results.tokens import Token, TokenTable
from januslens.v1 import edits_pb2


@dataclass(frozen=True)
class Effect:
    """The next-token distribution of one prompt, before and after an edit.

    Attributes:
        label: The probe's; empty for the prompt that was edited.
        target: The token watched.
        probability_before: Its probability without the edit.
        probability_after: Its probability with it.
        rank_before: How many tokens were likelier; 0 = it was the prediction.
        rank_after: How many tokens are likelier with the edit.
        predicted_before: The model's prediction without the edit.
        predicted_after: The model's prediction with it.
        kl_bits: `KL(before || after)` of the whole distribution.
    """

    label: str
    target: Token
    probability_before: float
    probability_after: float
    rank_before: int
    rank_after: int
    predicted_before: Token
    predicted_after: Token
    kl_bits: float

    @classmethod
    def from_message(cls, message: edits_pb2.Effect, tokens: TokenTable) -> Effect:
        """Read one effect, the texts of its tokens from `tokens`."""
        return cls(
            label=message.label,
            target=tokens[message.target_token_id],
            probability_before=message.probability_before,
            probability_after=message.probability_after,
            rank_before=message.rank_before,
            rank_after=message.rank_after,
            predicted_before=tokens[message.predicted_before],
            predicted_after=tokens[message.predicted_after],
            kl_bits=message.kl_bits,
        )


@dataclass(frozen=True)
class EditPreview:
    """What an edit would do to its own prompt and to others.

    Attributes:
        edited: On the prompt that the edit is made for.
        probes: On the probes, in the order they were given.
        provenance: The model's revision, data type, device and library versions.
        response: The message that it was read from.
    """

    edited: Effect
    probes: tuple[Effect, ...]
    provenance: Provenance
    response: edits_pb2.PreviewEditResponse = field(repr=False, compare=False)

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)

    @classmethod
    def from_message(cls, message: edits_pb2.PreviewEditResponse) -> EditPreview:
        """Read the whole response."""
        tokens = TokenTable(message.tokens)
        return cls(
            edited=Effect.from_message(message.edited, tokens),
            probes=tuple(Effect.from_message(probe, tokens) for probe in message.probes),
            provenance=Provenance.from_message(message.provenance),
            response=message,
        )
