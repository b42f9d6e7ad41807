"""Encode the responses of unary RPCs, and messages that several RPCs share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import version
from itertools import chain
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from januslens.v1 import (
    common_pb2,
    cost_pb2,
    edits_pb2,
    lens_pb2,
    models_pb2,
    neurons_pb2,
    server_pb2,
)
from januslens_server.errors import CostLimit, LimitViolation
from januslens_server.results import (
    EditPreview,
    Effect,
    Floats,
    FoundNeurons,
    Guarantee,
    Ints,
    LayerLevel,
    ModelFacts,
    ModelStatus,
    ProjectionTable,
    Provenance,
    StageTime,
    Token,
)
from januslens_server.rpc.admission import Estimate
from januslens_server.rpc.encode.columns import Columns, Parts
from januslens_server.rpc.status import limit_message, limit_number

# A message is full at half of the contract's 1 MiB, which leaves room for the last part, the texts
# of its tokens and the envelope.
PIECE_BYTES = 512 * 1024
# Maximum number of cached messages of vocabulary entries, about 200 bytes each.
ENTRIES = 2**16
NO_IDS = np.empty(0, np.int64)
# Bytes of a part's tag and length.
FRAME_BYTES = 8

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

ReadToken = Callable[[int], Token]


class Body(Protocol):
    """A message with the texts of those tokens that its stream has not sent before."""

    @property
    def tokens(self) -> RepeatedCompositeFieldContainer[common_pb2.Token]:
        """Vocabulary entries that no earlier message has."""

    def MergeFromString(self, serialized: bytes) -> int:
        """Add the fields of an encoded message."""


BodyT = TypeVar("BodyT", bound=Body)


class Entry(NamedTuple):
    """A vocabulary entry as a message, and its size in bytes inside another message."""

    message: common_pb2.Token
    size: int


class TokenTexts:
    """Returns the text of each token once, for the message that needs it first."""

    def __init__(self, read_token: ReadToken) -> None:
        """`read_token` returns the token with a vocabulary id."""
        self._read_token = read_token
        self._sent: set[int] = set()

    def of_prompt(self, tokens: Iterable[Token]) -> list[common_pb2.Token]:
        """Return the tokens of a prompt, with their texts."""
        messages = [token_message(token) for token in tokens]
        self._sent.update(message.id for message in messages)
        return messages

    def texts(self, ids: Iterable[int]) -> list[common_pb2.Token]:
        """Return the tokens of `ids` that no earlier message has."""
        return [entry.message for entry in self.entries(ids)]

    def entries(self, ids: Iterable[int]) -> list[Entry]:
        """Return the tokens as `texts` does, with their sizes."""
        unsent = [i for i in ids if i not in self._sent]
        self._sent.update(unsent)
        return [_entry(self._read_token(i)) for i in dict.fromkeys(unsent)]


class Pieces(Generic[BodyT]):
    """Distributes parts over as many messages as needed.

    Each message has the texts of the tokens that no earlier message has.
    """

    def __init__(
        self, new: Callable[[], BodyT], texts: TokenTexts, limit: int = PIECE_BYTES
    ) -> None:
        """`new` creates a message; it is called again when a message reaches `limit` bytes."""
        self._new = new
        self._texts = texts
        self._limit = limit
        self._body = new()
        self._size = 0

    def body(self) -> BodyT:
        """Return the message to add the next part to."""
        if self._size >= self._limit:
            self._body, self._size = self._new(), 0
        return self._body

    def added(self, part: Message, token_ids: Sequence[int] = ()) -> None:
        """Count a part that was added to the message, and add the texts of its tokens."""
        self._size += part.ByteSize() + FRAME_BYTES
        if token_ids and (entries := self._texts.entries(token_ids)):
            self._body.tokens.extend([entry.message for entry in entries])
            self._size += sum([entry.size for entry in entries])

    def extend(self, parts: Parts, token_ids: Ints = NO_IDS, users: Ints = NO_IDS) -> None:
        """Add encoded parts, and the texts of their tokens.

        `token_ids` `[m]` are tokens, and `users` `[m]` the indices of the parts that have them, in
        ascending order.
        """
        first = _first_uses(token_ids, users)
        entries = self._texts.entries(first)
        needed_by = np.array([first[entry.message.id] for entry in entries], np.int64)
        sizes = parts.sizes + FRAME_BYTES
        np.add.at(sizes, needed_by, [entry.size for entry in entries])
        ends, start = sizes.cumsum(), 0
        while start < len(ends):
            body, before = self.body(), int(ends[start - 1]) if start else 0
            full = int(np.searchsorted(ends, before + self._limit - self._size))
            stop = min(full + 1, len(ends))
            body.MergeFromString(parts.between(start, stop))
            least, most = np.searchsorted(needed_by, [start, stop])
            body.tokens.extend([entry.message for entry in entries[least:most]])
            self._size += int(ends[stop - 1]) - before
            start = stop


def _first_uses(token_ids: Ints, users: Ints) -> dict[int, int]:
    """Return the first user of each token, in the order of `token_ids`; both are `[m]`."""
    ids, first = np.unique(token_ids, return_index=True)
    order = first.argsort()
    return dict(zip(ids[order].tolist(), users[first[order]].tolist(), strict=True))


# Cached, because streams contain the same entries many times. A message is copied into its parent.
@lru_cache(ENTRIES)
def _entry(token: Token) -> Entry:
    message = token_message(token)
    return Entry(message, message.ByteSize() + FRAME_BYTES)


def token_message(token: Token) -> common_pb2.Token:
    """Encode a token with its bytes and, if it belongs to a text, its characters."""
    return common_pb2.Token(
        id=token.id,
        text=token.text,
        raw=token.raw,
        start=token.start,
        end=token.end,
        message=token.message,
    )


def named_tokens(table: ProjectionTable) -> list[list[int]]:
    """Return the token ids of each row's projection; none for rows that are not projected."""
    ids = np.concatenate([table.top_ids, table.bottom_ids], axis=1).tolist()
    return [row if told else [] for row, told in zip(ids, table.projected.tolist(), strict=True)]


def projections(table: ProjectionTable) -> list[Any]:
    """Return the fields of each row's `Projection`, for its first target; None if not projected.

    The fields are passed to the constructor of the message that contains the projection. Compared
    with creating a message and copying it, this takes two thirds of the time.
    """
    fields = _projection_fields(table)
    # Convert whole columns to lists, because access to single elements of numpy arrays is slow.
    rows: Iterator[tuple[Any, ...]] = zip(*(f.tolist() for f in fields.values()), strict=True)
    return [
        dict(zip(fields, row, strict=True)) if projected else None
        for projected, row in zip(table.projected.tolist(), rows, strict=True)
    ]


def projection_columns(table: ProjectionTable) -> Columns:
    """Encode each row of a table as a `Projection` for its first target, empty if not projected."""
    columns = Columns(lens_pb2.Projection, len(table.projected))
    for name, values in _projection_fields(table).items():
        if np.issubdtype(values.dtype, np.integer):
            add = columns.unsigned if values.ndim == 1 else columns.unsigned_lists
        else:
            add = columns.floats if values.ndim == 1 else columns.float_lists
        add(name, values, table.projected)
    return columns


def _projection_fields(table: ProjectionTable) -> dict[str, NDArray[Any]]:
    """The columns of a table by field of `Projection`, in the order of the fields' numbers."""
    fields: dict[str, NDArray[Any]] = {}
    for end in ("top", "bottom"):
        fields[f"{end}_token_ids"] = getattr(table, f"{end}_ids")
        fields[f"{end}_probabilities"] = getattr(table, f"{end}_probabilities")
        fields[f"{end}_logits"] = getattr(table, f"{end}_logits")
    fields["entropy_bits"] = table.entropy_bits
    if table.target_ids.shape[1]:
        fields["target_rank"] = table.target_ranks[:, 0]
        fields["target_probability"] = table.target_probabilities[:, 0]
        fields["target_logit"] = table.target_logits[:, 0]
    fields["log_normalizer"] = table.log_normalizers
    return fields


def provenance_message(provenance: Provenance) -> common_pb2.Provenance:
    """Encode which model, revision, device and library versions computed a result."""
    return common_pb2.Provenance(
        model=provenance.model,
        revision=provenance.revision,
        architecture=provenance.architecture,
        data_type=provenance.data_type,
        device=provenance.device,
        attention=provenance.attention,
        quantization=provenance.quantization,
        lora=provenance.lora,
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


def level_messages(levels: Iterable[LayerLevel]) -> list[common_pb2.LayerLevel]:
    """Encode the levels of layers."""
    return [
        common_pb2.LayerLevel(
            layer=found.layer,
            level=common_pb2.Level.ValueType(found.level),
            reason=found.reason,
            sublayers=[
                common_pb2.Sublayer(module=module, kind=common_pb2.SublayerKind.ValueType(kind))
                for module, kind in found.sublayers
            ],
        )
        for found in levels
    ]


def guarantee_messages(guarantees: Iterable[Guarantee]) -> list[common_pb2.Guarantee]:
    """Encode measured properties of a model."""
    return [
        common_pb2.Guarantee(
            name=g.name, measured_error=g.measured_error, tolerance=g.tolerance, held=g.held
        )
        for g in guarantees
    ]


def time_messages(times: Iterable[StageTime]) -> list[common_pb2.StageTime]:
    """Encode the seconds of each stage."""
    return [common_pb2.StageTime(stage=time.stage, seconds=time.seconds) for time in times]


def tensor_message(array: Floats) -> common_pb2.Tensor:
    """Encode a float32 array, little-endian and row-major."""
    return common_pb2.Tensor(
        data_type=common_pb2.DATA_TYPE_FLOAT32,
        shape=array.shape,
        data=np.ascontiguousarray(array, dtype="<f4").tobytes(),
    )


def tensor_columns(array: Floats) -> Columns:
    """Encode each row of `array` `[n, d]` as a `Tensor`, as `tensor_message` does."""
    count, width = array.shape
    columns = Columns(common_pb2.Tensor, count)
    columns.unsigned("data_type", np.full(count, common_pb2.DATA_TYPE_FLOAT32))
    columns.unsigned_lists("shape", np.full((count, 1), width))
    columns.float_lists("data", array)
    return columns


def model_message(status: ModelStatus) -> models_pb2.Model:
    """Encode a model's status; sizes and provenance are set when the model is loaded."""
    message = models_pb2.Model(
        name=status.name,
        state=models_pb2.Model.State.ValueType(status.state),
        state_reason=status.reason,
        guarantees=guarantee_messages(status.guarantees),
        levels=level_messages(status.levels),
        **({} if status.facts is None else asdict(status.facts)),
    )
    if status.provenance is not None:
        message.provenance.CopyFrom(provenance_message(status.provenance))
    return message


def list_models_response(
    statuses: Iterable[ModelStatus], next_page_token: str
) -> models_pb2.ListModelsResponse:
    """Encode one page of models."""
    return models_pb2.ListModelsResponse(
        models=map(model_message, statuses), next_page_token=next_page_token
    )


def get_model_response(status: ModelStatus) -> models_pb2.GetModelResponse:
    """Encode one model."""
    return models_pb2.GetModelResponse(model=model_message(status))


def tokenize_response(
    tokens: Iterable[Token], provenance: Provenance
) -> models_pb2.TokenizeResponse:
    """Encode the tokens of a text or a conversation."""
    return models_pb2.TokenizeResponse(
        tokens=map(token_message, tokens), provenance=provenance_message(provenance)
    )


def server_info_response(
    limits: Mapping[CostLimit, float], rpcs: Iterable[str]
) -> server_pb2.GetServerInfoResponse:
    """Encode the server's version and limits, and the RPCs of a caller."""
    listed = [
        server_pb2.ServerLimit(limit=limit_number(limit), allowed=limits[limit])
        for limit in CostLimit
        if limit in limits
    ]
    return server_pb2.GetServerInfoResponse(version=version("januslens"), rpcs=rpcs, limits=listed)


def estimate_response(
    estimate: Estimate[Any], exceeded: Sequence[LimitViolation]
) -> cost_pb2.EstimateCostResponse:
    """Encode an estimate and the limits that it exceeds."""
    return cost_pb2.EstimateCostResponse(
        projected_vectors=estimate.demand.vectors,
        flops=estimate.demand.flops,
        device_bytes=estimate.cost.memory,
        stream_bytes=estimate.cost.stream,
        seconds=estimate.cost.seconds,
        admissible=not exceeded,
        exceeded=map(limit_message, exceeded),
    )


def project_response(
    table: ProjectionTable, provenance: Provenance, read_token: ReadToken
) -> lens_pb2.ProjectResponse:
    """Encode one projection per vector, empty for a zero vector, and the texts of all tokens."""
    # As arrays, because thousands of lists can start a garbage collection, which stops all threads.
    named = np.concatenate([table.top_ids, table.bottom_ids], axis=1)[table.projected]
    response = lens_pb2.ProjectResponse(
        tokens=TokenTexts(read_token).texts(named.ravel().tolist()),
        provenance=provenance_message(provenance),
    )
    parts = Parts(lens_pb2.ProjectResponse, "projections", projection_columns(table))
    response.MergeFromString(parts.between(0, len(table.projected)))
    return response


def preview_edit_response(
    previews: Sequence[EditPreview], read_token: ReadToken
) -> edits_pb2.PreviewEditResponse:
    """Encode the effects of one edit or of a grid, and the texts of all tokens."""
    named = {
        token_id
        for preview in previews
        for effect in (preview.edited, *preview.probes)
        for token_id in (effect.target_token_id, effect.predicted_before, effect.predicted_after)
    }
    response = edits_pb2.PreviewEditResponse(
        provenance=provenance_message(previews[0].provenance),
        tokens=TokenTexts(read_token).texts(named),
    )
    for preview in previews:
        edited, probes = _effect(preview.edited), [_effect(effect) for effect in preview.probes]
        if preview.layer is None:
            response.edited.CopyFrom(edited)
            response.probes.extend(probes)
        else:
            response.cells.add(
                layer=preview.layer, strength=preview.strength, edited=edited, probes=probes
            )
    return response


def _effect(effect: Effect) -> edits_pb2.Effect:
    return edits_pb2.Effect(**asdict(effect))


def find_neurons_response(
    found: FoundNeurons, next_page_token: str, read_token: ReadToken
) -> neurons_pb2.FindNeuronsResponse:
    """Encode one page of neurons, and the texts of all tokens."""
    named = chain([found.token.id], *named_tokens(found.projections))
    return neurons_pb2.FindNeuronsResponse(
        neurons=_hits(found),
        next_page_token=next_page_token,
        tokens=TokenTexts(read_token).texts(named),
        token_id=found.token.id,
        depth=found.depth,
        total=found.total,
        provenance=provenance_message(found.provenance),
        limited_layers=level_messages(found.limited_layers),
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
