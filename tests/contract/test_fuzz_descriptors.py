"""Requests generated from the contract's descriptors, whether or not they make sense.

`test_fuzz` sends mostly valid requests. This module sends arbitrary requests to every RPC, and
bytes that may not be a message at all.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.calls import SERVICE, methods, refusal, started

# The statuses that a healthy server may return for any request.
ANSWERS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,  # a conversation: the demo has no chat template
    grpc.StatusCode.UNIMPLEMENTED,
}

FUZZ = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

TEXTS = st.sampled_from(
    ["", "demo", "Japan", " Paris", "../../etc/passwd", "a\r\nb", "%s{}", "\0"]
) | st.text(st.characters(codec="utf-8"), max_size=20)
SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "string": TEXTS,
    "bytes": st.binary(max_size=64),
    "bool": st.booleans(),
    "float": st.floats(width=32),
    "double": st.floats(),
    "uint32": st.integers(0, 4) | st.integers(0, 2**32 - 1),
    "uint64": st.integers(0, 2**64 - 1),
    "int32": st.integers(-4, 4) | st.integers(-(2**31), 2**31 - 1),
    "int64": st.integers(-(2**63), 2**63 - 1) | st.integers(0, 4),
    # proto3 keeps numbers that the enum does not have, so they reach the server.
    "enum": st.integers(-1, 30) | st.integers(-(2**31), 2**31 - 1),
}


@cache
def messages(descriptor: Any) -> st.SearchStrategy[Message]:
    """Return arbitrary messages of a type: each field set or not, at most one field per oneof."""
    # An optional scalar has a oneof of its own.
    oneofs = {oneof.name: oneof.fields for oneof in descriptor.oneofs if len(oneof.fields) > 1}
    exclusive = {field.name for fields in oneofs.values() for field in fields}
    parts = {
        field.name: values(field) for field in descriptor.fields if field.name not in exclusive
    }
    for name, fields in oneofs.items():
        parts[name] = st.one_of(*(st.tuples(st.just(f.name), values(f)) for f in fields))
    kind: type[Message] = descriptor._concrete_class

    def built(chosen: dict[str, Any]) -> Message:
        named = (chosen[part] if part in oneofs else (part, chosen[part]) for part in chosen)
        return kind(**dict(named))

    return st.fixed_dictionaries({}, optional=parts).map(built)


def values(field: Any) -> st.SearchStrategy[Any]:
    types = {number: name.removeprefix("TYPE_").lower() for name, number in TYPES.items()}
    if field.message_type is not None:
        one: st.SearchStrategy[Any] = messages(field.message_type)
    else:
        one = SCALARS[types[field.type]]
    return st.lists(one, max_size=4) if field.is_repeated else one


def types_of(descriptor: Any) -> dict[str, int]:
    return {name: getattr(descriptor, name) for name in dir(descriptor) if name.startswith("TYPE_")}


TYPES = types_of(next(iter(methods().values())).input_type.fields[0])


@pytest.mark.parametrize("method", methods())
def test_random_valid_messages_are_served_or_refused(channel: grpc.Channel, method: str) -> None:
    @FUZZ
    @given(messages(methods()[method].input_type))
    def check(request: Message) -> None:
        call = started(channel, method, request, timeout=60)
        outcome(call, method)
        assert call.code() in ANSWERS, call.details()
        if call.code() is not grpc.StatusCode.OK:
            assert refusal(call).info.domain == "januslens"

    check()
    assert_ready(channel)


@pytest.mark.parametrize("method", methods())
def test_random_bytes_are_served_or_refused(channel: grpc.Channel, method: str) -> None:
    descriptor = methods()[method]
    kind = channel.unary_stream if descriptor.server_streaming else channel.unary_unary
    raw: Any = kind(SERVICE + method)

    # Bytes have two outcomes, a message or a refusal, and both occur among the first 40.
    @settings(FUZZ, max_examples=60)
    @given(st.binary(max_size=200))
    def check(sent: bytes) -> None:
        call = (
            raw(sent, timeout=60) if descriptor.server_streaming else raw.future(sent, timeout=60)
        )
        outcome(call, method)
        assert call.code() in ANSWERS, call.details()
        # The error contains no text of the parser, and does not quote the message.
        assert "Error parsing" not in (call.details() or "")

    check()
    assert_ready(channel)


def outcome(call: Any, method: str) -> None:
    """Wait until the call has ended."""
    try:
        list(call) if methods()[method].server_streaming else call.result()
    except grpc.RpcError:
        return


def assert_ready(channel: grpc.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    ready = health.Check(health_pb2.HealthCheckRequest(service="januslens.ready"), timeout=30)
    assert ready.status == health_pb2.HealthCheckResponse.SERVING
