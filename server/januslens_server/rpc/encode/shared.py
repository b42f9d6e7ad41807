"""Messages that both streams use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from januslens.v1 import common_pb2, lens_pb2
from januslens_server.results import (
    Floats,
    Guarantee,
    ModelFacts,
    ProjectionTable,
    Provenance,
    StageTime,
    Token,
)

# Half of the contract's 1 MiB: the largest part, its token texts and the envelope come on top.
PIECE_BYTES = 512 * 1024
# Messages of vocabulary entries that are kept, of some 200 bytes each.
ENTRIES = 2**16
# A part's tag and length beside its own bytes.
FRAME_BYTES = 8

ReadToken = Callable[[int], Token]
Piece = dict[str, list[Message]]


class Part(NamedTuple):
    """An element of the repeated `field` of a message, and the tokens that it names."""

    field: str
    message: Message
    token_ids: Iterable[int] = ()


class TokenTexts:
    """Gives each token's text once: in the message that first needs it."""

    def __init__(self, read_token: ReadToken) -> None:
        """`read_token` looks a vocabulary id up."""
        self._read_token = read_token
        self._sent: set[int] = set()

    def of_prompt(self, tokens: Iterable[Token]) -> list[common_pb2.Token]:
        """A prompt's tokens, which bring their texts as they come."""
        messages = [token_message(token) for token in tokens]
        self._sent.update(message.id for message in messages)
        return messages

    def pieces(self, parts: Sequence[Part], limit: int = PIECE_BYTES) -> Iterator[Piece]:
        """The parts in messages' worth, at least one, by field and with their `tokens`.

        A piece stays within `limit` bytes, or is a single part that exceeds them by itself: what
        is too large is halved.
        """
        named = {token_id for part in parts for token_id in part.token_ids}
        tokens = self._unsent(named)
        size = sum(part.message.ByteSize() + FRAME_BYTES for part in parts)
        size += sum(token.ByteSize() + FRAME_BYTES for token in tokens)
        if size > limit and len(parts) > 1:
            half = len(parts) // 2
            yield from self.pieces(parts[:half], limit)
            yield from self.pieces(parts[half:], limit)
            return
        self._sent |= named
        piece: Piece = defaultdict(list)
        for part in parts:
            piece[part.field].append(part.message)
        if tokens:
            piece["tokens"] += tokens
        yield piece

    def texts(self, ids: Iterable[int]) -> list[common_pb2.Token]:
        """Those of `ids` that no earlier message brought, by id."""
        named = set(ids)
        tokens = self._unsent(named)
        self._sent |= named
        return tokens

    def _unsent(self, named: set[int]) -> list[common_pb2.Token]:
        return [_entry_message(self._read_token(i)) for i in sorted(named - self._sent)]


# Streams name the same entries again and again; a message joins another one as a copy.
@lru_cache(ENTRIES)
def _entry_message(token: Token) -> common_pb2.Token:
    return token_message(token)


def token_message(token: Token) -> common_pb2.Token:
    """A token with its bytes and, if it was read from a text, its characters."""
    return common_pb2.Token(
        id=token.id, text=token.text, raw=token.raw, start=token.start, end=token.end
    )


def named_tokens(table: ProjectionTable) -> list[list[int]]:
    """The token ids that each row's message names; none for rows that were not projected."""
    ids = np.concatenate([table.top_ids, table.bottom_ids], axis=1).tolist()
    return [row if told else [] for row, told in zip(ids, table.projected.tolist(), strict=True)]


def projection_messages(table: ProjectionTable) -> list[lens_pb2.Projection | None]:
    """One message a row, reporting its first target; None for rows that were not projected."""
    # Whole columns become Python lists at once: element-wise numpy access dominates otherwise.
    columns: dict[str, NDArray[Any]] = {
        "top_token_ids": table.top_ids,
        "top_probabilities": table.top_probabilities,
        "top_logits": table.top_logits,
        "bottom_token_ids": table.bottom_ids,
        "bottom_probabilities": table.bottom_probabilities,
        "bottom_logits": table.bottom_logits,
        "entropy_bits": table.entropy_bits,
    }
    if table.target_ids.shape[1]:
        columns["target_rank"] = table.target_ranks[:, 0]
        columns["target_probability"] = table.target_probabilities[:, 0]
        columns["target_logit"] = table.target_logits[:, 0]
    rows: Iterator[tuple[Any, ...]] = zip(*(c.tolist() for c in columns.values()), strict=True)
    return [
        lens_pb2.Projection(**dict(zip(columns, row, strict=True))) if projected else None
        for projected, row in zip(table.projected.tolist(), rows, strict=True)
    ]


def provenance_message(provenance: Provenance) -> common_pb2.Provenance:
    """Which weights computed a result, where and with what."""
    return common_pb2.Provenance(
        model=provenance.model,
        revision=provenance.revision,
        architecture=provenance.architecture,
        data_type=provenance.data_type,
        device=provenance.device,
        attention=provenance.attention,
        versions=provenance.versions,
        batch_size=provenance.batch_size,
    )


def sizes_message(facts: ModelFacts) -> common_pb2.ModelSizes:
    """What ranks and layers are read against."""
    return common_pb2.ModelSizes(
        n_layers=facts.n_layers,
        n_heads=facts.n_heads,
        d_mlp=facts.d_mlp,
        vocab_size=facts.vocab_size,
        d_head=facts.d_head,
    )


def guarantee_messages(guarantees: Iterable[Guarantee]) -> list[common_pb2.Guarantee]:
    """Measured properties of a model with their tolerances."""
    return [
        common_pb2.Guarantee(
            name=g.name, measured_error=g.measured_error, tolerance=g.tolerance, held=g.held
        )
        for g in guarantees
    ]


def time_messages(times: Iterable[StageTime]) -> list[common_pb2.StageTime]:
    """Seconds by stage."""
    return [common_pb2.StageTime(stage=time.stage, seconds=time.seconds) for time in times]


def tensor_message(array: Floats) -> common_pb2.Tensor:
    """A float32 array, little-endian and row-major."""
    return common_pb2.Tensor(
        data_type=common_pb2.DATA_TYPE_FLOAT32,
        shape=array.shape,
        data=np.ascontiguousarray(array, dtype="<f4").tobytes(),
    )
