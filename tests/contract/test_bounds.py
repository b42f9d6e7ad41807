"""Every text, list and byte field of a request has a documented limit, which is enforced."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from januslens.v1 import common_pb2, edits_pb2, intervene_pb2, interventions_pb2, trace_pb2
from januslens_server.errors import InvalidRequest
from januslens_server.rpc.call import ADMIN
from januslens_server.rpc.decode import BOUNDS, check_counts
from tests.support.calls import SERVICE, methods, refused


def nested(number: int, content: bytes) -> bytes:
    """A field of bytes or of a message, as protobuf encodes it."""
    size, length = len(content), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    tag = [number << 3 | 2] if number < 16 else [(number << 3 | 2) & 127 | 128, number >> 4]
    return bytes([*tag, *length, size]) + content


API = Path(__file__).parents[2] / "docs" / "api.md"


def bounded(message: Any, seen: frozenset[str] = frozenset()) -> Iterator[tuple[str, list[Any]]]:
    """Return every field that can be long, in a message and those inside it, with its path."""
    if message.name in seen:
        return
    for field in message.fields:
        if field.is_repeated or field.type in {field.TYPE_STRING, field.TYPE_BYTES}:
            yield f"{message.name}.{field.name}", [field]
        if field.message_type is not None:
            for name, way in bounded(field.message_type, seen | {message.name}):
                yield name, [field, *way]


FIELDS = [
    (method, name, way)
    for method in methods()
    for name, way in bounded(methods()[method].input_type)
]


def test_every_field_that_can_be_long_has_a_bound_and_nothing_else() -> None:
    administrative = {name for method in ADMIN.methods for name, _ in bounded(method.input_type)}
    assert {name for _, name, _ in FIELDS} | administrative == set(BOUNDS)


@pytest.mark.parametrize(
    ("method", "way"),
    [(method, way) for method, _, way in FIELDS],
    ids=[f"{method}-{'.'.join(field.name for field in way)}" for method, _, way in FIELDS],
)
def test_a_longer_one_is_refused_by_its_path(
    channel: grpc.Channel, method: str, way: list[Any]
) -> None:
    request = methods()[method].input_type._concrete_class()
    field, limit = way[-1], BOUNDS[f"{way[-1].containing_type.name}.{way[-1].name}"]
    fill(request, way, limit + 1)
    answer = refused(channel, method, request)
    if request.ByteSize() > 4 * 2**20:  # gRPC's own limit comes first
        assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        return
    unit = "entries" if field.is_repeated else "bytes"
    assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
    assert answer.fields == [path(way)]
    assert answer.text == f"{path(way)}: too long: expected at most {limit} {unit}, got {limit + 1}"


def fill(message: Any, way: list[Any], length: int) -> None:
    """Set the field at the end of the path to a value of this length."""
    field, *further = way
    if further:
        inside = getattr(message, field.name)
        fill(inside.add() if field.is_repeated else inside, further, length)
    elif field.is_repeated and field.message_type is not None:
        for _ in range(length):
            getattr(message, field.name).add()
    elif field.is_repeated:
        entry: Any = "x" if field.type == field.TYPE_STRING else 1
        getattr(message, field.name).extend([entry] * length)
    else:
        text = "x" * length
        setattr(message, field.name, text.encode() if field.type == field.TYPE_BYTES else text)


def path(way: list[Any]) -> str:
    *before, last = way
    steps = [f"{field.name}[0]" if field.is_repeated else str(field.name) for field in before]
    return ".".join([*steps, str(last.name)])


def test_a_text_is_measured_in_bytes(channel: grpc.Channel) -> None:
    request: Message = methods()["Tokenize"].input_type._concrete_class(text="é" * 70_000)
    assert refused(channel, "Tokenize", request).text.endswith("at most 131072 bytes, got 140000")


def test_the_page_has_every_bound() -> None:
    row = re.compile(r"^\| (`.+?`) \| ([\d,]+) (?:bytes|entries) \|", re.MULTILINE)
    listed = {
        name: int(limit.replace(",", ""))
        for names, limit in row.findall(API.read_text())
        for name in re.findall(r"`(\S+)`", names)
    }
    assert listed == BOUNDS


CHAT = common_pb2.Input.DESCRIPTOR.fields_by_name["chat"].number
MESSAGES = common_pb2.Chat.DESCRIPTOR.fields_by_name["messages"].number
PROBES = edits_pb2.PreviewEditRequest.DESCRIPTOR.fields_by_name["probes"].number
EMPTY = [
    (edits_pb2.PreviewEditRequest, "probes", b""),
    (edits_pb2.PreviewEditRequest, "input", b""),
    (trace_pb2.TraceRequest, "layers", None),
    (trace_pb2.TraceRequest, "input", nested(CHAT, nested(MESSAGES, b"") * 2_000_000)),
]


@pytest.mark.parametrize(
    ("kind", "field", "content"), EMPTY, ids=["probes", "input", "layers", "chat"]
)
def test_requests_with_very_many_fields_are_refused_before_they_are_parsed(
    channel: grpc.Channel, kind: Any, field: str, content: bytes | None
) -> None:
    """Two million empty messages in 4 MiB would take 128 MiB and hold up other calls."""
    number = kind.DESCRIPTOR.fields_by_name[field].number
    one = bytes([number << 3, 0]) if content is None else nested(number, content)
    encoded = one * ((4 * 2**20 - 1000) // len(one))
    with pytest.raises(InvalidRequest, match="too many fields; expected at most 100000"):
        check_counts(kind.DESCRIPTOR, encoded)
    method = kind.DESCRIPTOR.name.removesuffix("Request")
    call: Any = channel.unary_stream(SERVICE + method)
    with pytest.raises(grpc.RpcError, match="too many fields"):
        list(call(encoded))


def test_large_requests_within_all_bounds_are_not_refused_for_their_fields() -> None:
    ids = common_pb2.TokenIds(ids=range(2**18))
    probes = [edits_pb2.Probe(label="x" * 4096)] * 64
    chat = common_pb2.Chat(messages=[common_pb2.ChatMessage(role="user", content="x" * 100)] * 1024)
    zero = interventions_pb2.Intervention(layers=[1], positions=[0, 1])
    experiment = intervene_pb2.Experiment(label="layer 1", interventions=[zero])
    for request in (
        intervene_pb2.InterveneRequest(experiments=[experiment] * 2**14),
        trace_pb2.TraceRequest(
            input=common_pb2.Input(token_ids=ids), positions=range(2**16), layers=range(4096)
        ),
        edits_pb2.PreviewEditRequest(input=common_pb2.Input(chat=chat), probes=probes),
    ):
        check_counts(request.DESCRIPTOR, request.SerializeToString())


def test_counting_reads_encoded_fields_as_protobuf_does() -> None:
    """Fields of every wire type before the many: a wrong length would end the count early."""
    many = nested(PROBES, b"") * 200_000
    fixed = b"\xf9\x07" + bytes(8) + b"\xfd\x07" + bytes(4) + b"\xf8\x07\xff\xff\x01"
    encoded = fixed + nested(127, bytes(300)) + many
    request = edits_pb2.PreviewEditRequest.FromString(encoded)
    assert len(request.probes) == 200_000
    with pytest.raises(InvalidRequest, match="too many fields"):
        check_counts(request.DESCRIPTOR, encoded)
