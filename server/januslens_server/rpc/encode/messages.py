"""Messages of the RPCs that answer once, and those that the streams share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from januslens.v1 import common_pb2, cost_pb2, edits_pb2, lens_pb2, models_pb2, neurons_pb2
from januslens_server.errors import LimitExceeded
from januslens_server.results import (
    EditPreview,
    Effect,
    Floats,
    FoundNeurons,
    Guarantee,
    ModelFacts,
    ModelStatus,
    ProjectionTable,
    Provenance,
    StageTime,
    Token,
)
from januslens_server.rpc.admission import Estimate

# Half of the contract's 1 MiB: the last part, its token texts and the envelope come on top.
PIECE_BYTES = 512 * 1024
# Messages of vocabulary entries that are kept, of some 200 bytes each.
ENTRIES = 2**16
# A part's tag and length beside its own bytes.
FRAME_BYTES = 8

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

ReadToken = Callable[[int], Token]


class Body(Protocol):
    """A message that brings the texts of the tokens that it names."""

    @property
    def tokens(self) -> RepeatedCompositeFieldContainer[common_pb2.Token]:
        """Vocabulary entries that no earlier message brought."""


BodyT = TypeVar("BodyT", bound=Body)


class Entry(NamedTuple):
    """A vocabulary entry as it is sent, and its size in a message in bytes."""

    message: common_pb2.Token
    size: int


class TokenTexts:
    """Gives each token's text once: in the message that first needs it."""

    def __init__(self, read_token: ReadToken) -> None:
        """`read_token` looks a vocabulary id up."""
        self._read_token = read_token
        self._sent: set[int] = set()

    def of_prompt(self, tokens: Iterable[Token]) -> list[common_pb2.Token]:
        """Tokens of a prompt, with their texts."""
        messages = [token_message(token) for token in tokens]
        self._sent.update(message.id for message in messages)
        return messages

    def texts(self, ids: Iterable[int]) -> list[common_pb2.Token]:
        """Those of `ids` that no earlier message brought."""
        return [entry.message for entry in self.entries(ids)]

    def entries(self, ids: Iterable[int]) -> list[Entry]:
        """As `texts`, with their sizes."""
        unsent = [i for i in ids if i not in self._sent]
        self._sent.update(unsent)
        return [_entry(self._read_token(i)) for i in dict.fromkeys(unsent)]


class Pieces(Generic[BodyT]):
    """Bodies of messages, filled one after the other with parts that would be too much for one.

    Each brings the texts of the tokens that it is the first to name.
    """

    def __init__(
        self, new: Callable[[], BodyT], texts: TokenTexts, limit: int = PIECE_BYTES
    ) -> None:
        """`new` begins a body: the first at once, another when one has come to `limit` bytes."""
        self._new = new
        self._texts = texts
        self._limit = limit
        self._body = new()
        self._size = 0

    def body(self) -> BodyT:
        """Where the next part belongs."""
        if self._size >= self._limit:
            self._body, self._size = self._new(), 0
        return self._body

    def added(self, part: Message, token_ids: Sequence[int] = ()) -> None:
        """Count a part that was put into the body, and bring the texts of its tokens."""
        self._size += part.ByteSize() + FRAME_BYTES
        if token_ids and (entries := self._texts.entries(token_ids)):
            self._body.tokens.extend([entry.message for entry in entries])
            self._size += sum([entry.size for entry in entries])


# Streams name the same entries again and again; a message joins another one as a copy.
@lru_cache(ENTRIES)
def _entry(token: Token) -> Entry:
    message = token_message(token)
    return Entry(message, message.ByteSize() + FRAME_BYTES)


def token_message(token: Token) -> common_pb2.Token:
    """A token with its bytes and, if it was read from a text, its characters."""
    return common_pb2.Token(
        id=token.id, text=token.text, raw=token.raw, start=token.start, end=token.end
    )


def named_tokens(table: ProjectionTable) -> list[list[int]]:
    """The token ids that each row's message names; none for rows that were not projected."""
    ids = np.concatenate([table.top_ids, table.bottom_ids], axis=1).tolist()
    return [row if told else [] for row, told in zip(ids, table.projected.tolist(), strict=True)]


def projections(table: ProjectionTable) -> list[Any]:
    """One a row, reporting its first target; None for rows that were not projected.

    As the fields of a `Projection`, from which the message that has it makes it in its own place:
    two thirds of the time that a message and its copy take.
    """
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
        dict(zip(columns, row, strict=True)) if projected else None
        for projected, row in zip(table.projected.tolist(), rows, strict=True)
    ]


def provenance_message(provenance: Provenance) -> common_pb2.Provenance:
    """Encode which model, revision, device and library versions computed a result."""
    return common_pb2.Provenance(
        model=provenance.model,
        revision=provenance.revision,
        architecture=provenance.architecture,
        data_type=provenance.data_type,
        device=provenance.device,
        attention=provenance.attention,
        versions=provenance.versions,
    )


def sizes_message(facts: ModelFacts) -> common_pb2.ModelSizes:
    """Encode the model's sizes, which clients need to interpret ranks and layer numbers."""
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


def model_message(status: ModelStatus) -> models_pb2.Model:
    """Sizes and provenance only once the model is loaded."""
    message = models_pb2.Model(
        name=status.name,
        state=models_pb2.Model.State.ValueType(status.state),
        state_reason=status.reason,
        guarantees=guarantee_messages(status.guarantees),
        **({} if status.facts is None else asdict(status.facts)),
    )
    if status.provenance is not None:
        message.provenance.CopyFrom(provenance_message(status.provenance))
    return message


def estimate_message(
    estimate: Estimate[Any], exceeded: Iterable[LimitExceeded]
) -> cost_pb2.EstimateCostResponse:
    """Encode an estimate; `exceeded` are the limits that it exceeds."""
    limit = next((error.limit for error in exceeded), "")
    return cost_pb2.EstimateCostResponse(
        projected_vectors=estimate.demand.vectors,
        flops=estimate.demand.flops,
        device_bytes=estimate.cost.memory,
        stream_bytes=estimate.cost.stream,
        seconds=estimate.cost.seconds,
        admissible=not limit,
        limit_exceeded=limit,
    )


def project_response(
    table: ProjectionTable, provenance: Provenance, read_token: ReadToken
) -> lens_pb2.ProjectResponse:
    """One projection a vector, empty for a zero vector, and the texts of all tokens named."""
    read: list[Any] = [projection or {} for projection in projections(table)]
    return lens_pb2.ProjectResponse(
        projections=read,
        tokens=TokenTexts(read_token).texts(chain.from_iterable(named_tokens(table))),
        provenance=provenance_message(provenance),
    )


def preview_edit_response(
    preview: EditPreview, read_token: ReadToken
) -> edits_pb2.PreviewEditResponse:
    """Effects, and the texts of every token that they name."""
    named = {
        token_id
        for effect in (preview.edited, *preview.probes)
        for token_id in (effect.target_token_id, effect.predicted_before, effect.predicted_after)
    }
    return edits_pb2.PreviewEditResponse(
        edited=_effect(preview.edited),
        probes=[_effect(effect) for effect in preview.probes],
        provenance=provenance_message(preview.provenance),
        tokens=TokenTexts(read_token).texts(named),
    )


def _effect(effect: Effect) -> edits_pb2.Effect:
    return edits_pb2.Effect(**asdict(effect))


def find_neurons_response(
    found: FoundNeurons, next_page_token: str, read_token: ReadToken
) -> neurons_pb2.FindNeuronsResponse:
    """One page, with the texts of every token that it names."""
    named = chain([found.token.id], *named_tokens(found.projections))
    return neurons_pb2.FindNeuronsResponse(
        neurons=_hits(found),
        next_page_token=next_page_token,
        tokens=TokenTexts(read_token).texts(named),
        token_id=found.token.id,
        depth=found.depth,
        total=found.total,
        provenance=provenance_message(found.provenance),
    )


def _hits(found: FoundNeurons) -> Iterator[neurons_pb2.NeuronHit]:
    columns = zip(
        found.layers.tolist(),
        found.neurons.tolist(),
        found.experts.tolist(),
        found.ranks.tolist(),
        found.projections.target_logits[:, 0].tolist(),
        projections(found.projections),
        strict=True,
    )
    for layer, neuron, expert, rank, logit, value in columns:
        yield neurons_pb2.NeuronHit(
            layer=layer,
            neuron=neuron,
            expert=None if expert < 0 else expert,
            rank=rank,
            logit=logit,
            value=value,
        )
