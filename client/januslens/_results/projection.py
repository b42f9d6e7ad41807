"""A vector read in the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from januslens._notebook.others import projections_html
from januslens._results.tokens import Token, TokenTable
from januslens.v1 import lens_pb2


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
        """What a notebook shows."""
        return projections_html([self])


class Projections(list[Projection]):
    """One projection a vector, in the order of the vectors."""

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return projections_html(self)


def _scores(
    ids: Iterable[int], probabilities: Iterable[float], logits: Iterable[float], tokens: TokenTable
) -> tuple[TokenScore, ...]:
    named = map(tokens.__getitem__, ids)
    return tuple(map(TokenScore._make, zip(named, probabilities, logits, strict=True)))
