"""Every text, every list and all bytes of a request have a bound, which holds and is documented."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from januslens_server.rpc.decode import BOUNDS
from tests.support.calls import methods, refused

API = Path(__file__).parents[2] / "docs" / "api.md"


def bounded(message: Any, seen: frozenset[str] = frozenset()) -> Iterator[tuple[str, list[Any]]]:
    """Every field of a message and of those inside it that can be long, with the way to it."""
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
    assert {name for _, name, _ in FIELDS} == set(BOUNDS)


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
    """Give the field at the end of the way this length."""
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
