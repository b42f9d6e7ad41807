"""Encode the responses of unary RPCs, and messages that several RPCs share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import numpy as np
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
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
    service_pb2,
    streams_pb2,
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
from januslens_server.rpc.encode.columns import Columns, Parts, key, with_length
from januslens_server.rpc.status import limit_message, limit_number
from januslens_server.scheduling.job import Waiting

_METHODS = service_pb2.DESCRIPTOR.services_by_name["IntrospectionService"].methods_by_name

# A message is full at half of the contract's 1 MiB, which leaves room for the last part, the texts
# of its tokens and the envelope.
PIECE_BYTES = 512 * 1024
# Maximum number of encoded tokens kept for a vocabulary, about 200 bytes each.
ENTRIES = 2**16
# Bytes of a part's tag and length.
FRAME_BYTES = 8

ReadToken = Callable[[int], Token]

# The encoded tokens of each vocabulary by id, because streams contain the same tokens many times.
_ENCODED: WeakKeyDictionary[ReadToken, dict[int, bytes]] = WeakKeyDictionary()


class TokenTexts:
    """Returns the text of each token once, for the message that needs it first."""

    def __init__(self, read_token: ReadToken) -> None:
        """`read_token` returns the token with a vocabulary id."""
        self._read_token = read_token
        self._encoded = _ENCODED.setdefault(read_token, {})
        self._sent = np.zeros(0, np.bool_)  # by token

    def of_prompt(self, tokens: Iterable[Token]) -> list[common_pb2.Token]:
        """Return the tokens of a prompt, with their texts."""
        messages = [token_message(token) for token in tokens]
        self.unsent(np.array([message.id for message in messages], np.int64))
        return messages

    def texts(self, ids: Iterable[int]) -> list[common_pb2.Token]:
        """Return the tokens of `ids` that no earlier message has."""
        named = np.fromiter(ids, np.int64)
        return [token_message(self._read_token(i)) for i in named[self.unsent(named)].tolist()]

    def unsent(self, ids: Ints) -> Ints:
        """Return the indices of tokens that no earlier message has, which now count as sent.

        Of a token that is in `ids` `[n]` several times, this is the first index.
        """
        missing = int(ids.max(initial=-1)) + 1 - len(self._sent)
        if missing > 0:
            self._sent = np.pad(self._sent, (0, missing))
        new = np.flatnonzero(~self._sent[ids])
        first = new[np.sort(np.unique(ids[new], return_index=True)[1])]
        self._sent[ids[first]] = True
        return first

    def encoded(self, ids: Sequence[int]) -> list[bytes]:
        """Return tokens as bytes, each after its length."""
        found = list(map(self._encoded.get, ids))
        if None in found:
            return [self._encoded.get(i) or self._encode(i) for i in ids]
        return cast(list[bytes], found)

    def _encode(self, token_id: int) -> bytes:
        content = token_message(self._read_token(token_id)).SerializeToString(deterministic=True)
        encoded = with_length(content)
        if len(self._encoded) < ENTRIES:
            self._encoded[token_id] = encoded
        return encoded


class Pieces:
    """Distributes parts over as many messages as needed, and returns these as bytes.

    Each message has the texts of the tokens that no earlier message has. The fields are in the
    order of their numbers, as protocol buffers write them. Parsing and serializing the parts again
    would take as long as encoding them.
    """

    def __init__(self, frame: Message, texts: TokenTexts, limit: int = PIECE_BYTES) -> None:
        """Each message has the fields of `frame`, and about `limit` bytes at most."""
        self._numbers = {field.name: field.number for field in frame.DESCRIPTOR.fields}
        self._token_key = key(type(frame), "tokens")
        self._frame = _fields(frame)
        self._texts = texts
        self._limit = limit
        self._bodies: list[dict[int, list[bytes]]] = []
        self._begin()

    def _begin(self) -> None:
        self._bodies.append({number: [content] for number, content in self._frame.items()})
        self._size = 0

    def extend(self, parts: Parts, readings: Iterable[Reading] = ()) -> None:
        """Add encoded parts, and the texts of the tokens that their `readings` list."""
        token_ids, users = _uses(list(readings))
        unsent = self._texts.unsent(token_ids)
        entries = self._texts.encoded(token_ids[unsent].tolist())
        needed_by = users[unsent]
        sizes = parts.sizes + FRAME_BYTES
        lengths = np.fromiter(map(len, entries), np.int64, len(entries))
        np.add.at(sizes, needed_by, lengths + FRAME_BYTES)
        ends, start = sizes.cumsum(), 0
        while start < len(ends):
            if self._size >= self._limit:
                self._begin()
            before = int(ends[start - 1]) if start else 0
            full = int(np.searchsorted(ends, before + self._limit - self._size))
            stop = min(full + 1, len(ends))
            self._add(parts.field, parts.between(start, stop))
            least, most = np.searchsorted(needed_by, [start, stop])
            self._add("tokens", self._token_key.join([b"", *entries[least:most]]))
            self._size += int(ends[stop - 1]) - before
            start = stop

    def _add(self, field: str, content: bytes) -> None:
        self._bodies[-1].setdefault(self._numbers[field], []).append(content)

    def messages(self, ending: Message) -> list[bytes]:
        """Return all messages; the last one also has the fields of `ending`."""
        for number, content in _fields(ending).items():
            self._bodies[-1].setdefault(number, []).append(content)
        return [
            b"".join(chain.from_iterable(body[number] for number in sorted(body)))
            for body in self._bodies
        ]


def _fields(message: Message) -> dict[int, bytes]:
    """Return the fields that are set in a message, as bytes by number."""
    names = {field.name: field.number for field, _ in message.ListFields()}
    found = {}
    for name, number in names.items():
        alone = type(message)()
        alone.CopyFrom(message)
        for other in names.keys() - {name}:
            alone.ClearField(other)
        found[number] = alone.SerializeToString(deterministic=True)
    return found


def with_body(response: Message, field: str, body: bytes) -> bytes:
    """Return a response with an encoded message in a field, behind all others that it has."""
    start = response.SerializeToString(deterministic=True)
    return start + key(type(response), field) + with_length(body)


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


def _uses(readings: Sequence[Reading]) -> tuple[Ints, Ints]:
    """Return the tokens that parts list, in the order of the parts, and the part of each token."""
    if not readings:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    token_ids = np.concatenate([each.token_ids().ravel() for each in readings])
    users = np.concatenate([each.users() for each in readings])
    if len(readings) > 1:
        order = users.argsort(kind="stable")
        token_ids, users = token_ids[order], users[order]
    return token_ids, users


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


def waiting_response(method: str, place: Waiting) -> Message:
    """Encode the place in the queue of a request of the streaming RPC `method`."""
    response: Any = GetMessageClass(_METHODS[method].output_type)()
    waiting = streams_pb2.Waiting(
        requests_ahead=place.requests_ahead,
        expected_seconds=place.expected_seconds,
        waited_seconds=place.waited_seconds,
    )
    response.waiting.CopyFrom(waiting)
    message: Message = response
    return message


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


def _sizes(facts: ModelFacts | None) -> dict[str, Any]:
    """Return the fields of a model's sizes; none before it is loaded."""
    if facts is None:
        return {}
    fields = asdict(facts)
    return fields | {"residual_streams": fields.pop("n_streams")}


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
        **_sizes(status.facts),
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
            if preview.gradient_cosine is not None:
                response.gradient_cosine = preview.gradient_cosine
        else:
            response.cells.add(
                layer=preview.layer,
                strength=preview.strength,
                edited=edited,
                probes=probes,
                gradient_cosine=preview.gradient_cosine,
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
