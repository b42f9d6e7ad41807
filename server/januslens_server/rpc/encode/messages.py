"""Encode the responses of unary RPCs, and messages that several RPCs share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from januslens.v1 import (
    admin_pb2,
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
    Flags,
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
        return [entry.message for entry in self.entries(ids).values()]

    def entries(self, ids: Iterable[int]) -> dict[int, Entry]:
        """Return the tokens as `texts` does, with their sizes, by id."""
        unsent = dict.fromkeys(i for i in ids if i not in self._sent)
        self._sent.update(unsent)
        return {i: _entry(self._read_token(i)) for i in unsent}


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

    def extend(self, parts: Parts, readings: Iterable[Reading] = ()) -> None:
        """Add encoded parts, and the texts of the tokens that their `readings` list."""
        first = _first_uses(list(readings))
        found = self._texts.entries(first)
        entries = list(found.values())
        needed_by = np.array([first[token_id] for token_id in found], np.int64)
        sizes = parts.sizes + FRAME_BYTES
        np.add.at(sizes, needed_by, [entry.size for entry in entries])
        ends, start = sizes.cumsum(), 0
        while start < len(ends):
            if self._size >= self._limit:
                self._body, self._size = self._new(), 0
            body, before = self._body, int(ends[start - 1]) if start else 0
            full = int(np.searchsorted(ends, before + self._limit - self._size))
            stop = min(full + 1, len(ends))
            body.MergeFromString(parts.between(start, stop))
            least, most = np.searchsorted(needed_by, [start, stop])
            body.tokens.extend([entry.message for entry in entries[least:most]])
            self._size += int(ends[stop - 1]) - before
            start = stop


class Reading(NamedTuple):
    """A table of projections, and for each part the index of its row; -1 means not projected."""

    table: ProjectionTable
    rows: Ints

    @classmethod
    def of(cls, table: ProjectionTable) -> Reading:
        """Return a reading in which every row of the table belongs to the part of its index."""
        return cls(table, np.where(table.projected, np.arange(len(table.projected)), -1))

    @property
    def projected(self) -> Flags:
        """Whether each part is projected."""
        return self.rows >= 0

    def token_ids(self) -> Ints:
        """Return the tokens of the parts that are projected."""
        rows = self.rows[self.projected]
        return np.concatenate([self.table.top_ids[rows], self.table.bottom_ids[rows]], axis=1)

    def users(self) -> Ints:
        """Return the index of the part of each token."""
        listed = self.table.top_ids.shape[1] + self.table.bottom_ids.shape[1]
        return np.flatnonzero(self.projected).repeat(listed)

    def add_to(self, columns: Columns, field: str) -> None:
        """Add the projections of the parts as a field."""
        if self.projected.any():
            table = self.table.rows(self.rows.clip(0))
            columns.delimited(field, projection_columns(table).cells(), self.projected)


def _first_uses(readings: Sequence[Reading]) -> dict[int, int]:
    """Return the first part that lists each token, in the order of the parts."""
    if not readings:
        return {}
    token_ids = np.concatenate([each.token_ids().ravel() for each in readings])
    users = np.concatenate([each.users() for each in readings])
    order = users.argsort(kind="stable")
    token_ids, users = token_ids[order], users[order]
    ids, first = np.unique(token_ids, return_index=True)
    by_use = first.argsort()
    return dict(zip(ids[by_use].tolist(), users[first[by_use]].tolist(), strict=True))


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
            linear_maps=[common_pb2.LinearMap(**each._asdict()) for each in found.linear_maps],
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
        loaded_fraction=status.loaded_fraction,
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


def load_model_response(status: ModelStatus) -> admin_pb2.LoadModelResponse:
    """Encode a model that is being loaded."""
    return admin_pb2.LoadModelResponse(model=model_message(status))


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
    named = Reading.of(table).token_ids()
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
    reading = Reading.of(found.projections)
    response = neurons_pb2.FindNeuronsResponse(
        next_page_token=next_page_token,
        tokens=TokenTexts(read_token).texts(
            [found.token.id, *reading.token_ids().ravel().tolist()]
        ),
        token_id=found.token.id,
        depth=found.depth,
        total=found.total,
        provenance=provenance_message(found.provenance),
        limited_layers=level_messages(found.limited_layers),
    )
    hits = Columns(neurons_pb2.NeuronHit, len(found.neurons))
    hits.unsigned("layer", found.layers)
    hits.unsigned("neuron", found.neurons)
    hits.unsigned("expert", found.experts, found.experts >= 0)
    hits.unsigned("rank", found.ranks)
    hits.floats("logit", found.projections.target_logits[:, 0])
    reading.add_to(hits, "value")
    parts = Parts(neurons_pb2.FindNeuronsResponse, "neurons", hits)
    response.MergeFromString(parts.between(0, len(hits)))
    return response
