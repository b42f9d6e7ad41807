"""Messages that both streams use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from google.protobuf.message import Message

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
# A part's tag and length beside its own bytes.
FRAME_BYTES = 8

ReadToken = Callable[[int], Token]
Piece = dict[str, list[Message]]


class Part(NamedTuple):
    """An element of the repeated `field` of a message, and the readings that it shows."""

    field: str
    message: Message
    projections: Iterable[lens_pb2.Projection] = ()


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

    def pieces(self, parts: Iterable[Part], limit: int = PIECE_BYTES) -> Iterator[Piece]:
        """The parts in messages' worth, at least one, by field and with their `tokens`.

        A piece stays within `limit` bytes, or is a single part that exceeds them by itself.
        """
        piece: Piece = defaultdict(list)
        size = 0
        for part in parts:
            tokens = self.unsent(part.projections)
            added = part.message.ByteSize() + FRAME_BYTES
            for token in tokens:
                added += token.ByteSize() + FRAME_BYTES
            if piece and size + added > limit:
                yield piece
                piece, size = defaultdict(list), 0
            piece[part.field].append(part.message)
            if tokens:
                piece["tokens"] += tokens
            size += added
        yield piece

    def unsent(self, projections: Iterable[lens_pb2.Projection]) -> list[common_pb2.Token]:
        """Tokens that the projections name and no earlier message brought."""
        named: set[int] = set()
        for projection in projections:
            named.update(projection.top_token_ids)
            named.update(projection.bottom_token_ids)
        return self.texts(named)

    def texts(self, ids: Iterable[int]) -> list[common_pb2.Token]:
        """Those of `ids` that no earlier message brought, by id."""
        fresh = set(ids) - self._sent
        if not fresh:
            return []
        self._sent |= fresh
        return [token_message(self._read_token(token_id)) for token_id in sorted(fresh)]


def token_message(token: Token) -> common_pb2.Token:
    """A token with its bytes and, if it was read from a text, its characters."""
    return common_pb2.Token(
        id=token.id, text=token.text, raw=token.raw, start=token.start, end=token.end
    )


def projection_messages(table: ProjectionTable) -> list[lens_pb2.Projection | None]:
    """One message a row, reporting its first target; None for rows that were not projected."""
    # Whole columns become Python lists at once: element-wise numpy access dominates otherwise.
    rows = zip(
        table.projected.tolist(),
        table.top_ids.tolist(),
        table.top_probabilities.tolist(),
        table.top_logits.tolist(),
        table.bottom_ids.tolist(),
        table.bottom_probabilities.tolist(),
        table.bottom_logits.tolist(),
        table.entropy_bits.tolist(),
        strict=True,
    )
    messages = [
        lens_pb2.Projection(
            top_token_ids=top_ids,
            top_probabilities=top_probabilities,
            top_logits=top_logits,
            bottom_token_ids=bottom_ids,
            bottom_probabilities=bottom_probabilities,
            bottom_logits=bottom_logits,
            entropy_bits=entropy,
        )
        if projected
        else None
        for (
            projected,
            top_ids,
            top_probabilities,
            top_logits,
            bottom_ids,
            bottom_probabilities,
            bottom_logits,
            entropy,
        ) in rows
    ]
    _add_targets(messages, table)
    return messages


def _add_targets(messages: list[lens_pb2.Projection | None], table: ProjectionTable) -> None:
    if table.target_ids.shape[1] == 0:
        return
    ranks = table.target_ranks[:, 0].tolist()
    probabilities = table.target_probabilities[:, 0].tolist()
    logits = table.target_logits[:, 0].tolist()
    for message, rank, probability, logit in zip(
        messages, ranks, probabilities, logits, strict=True
    ):
        if message is not None:
            message.target_rank = rank
            message.target_probability = probability
            message.target_logit = logit


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
