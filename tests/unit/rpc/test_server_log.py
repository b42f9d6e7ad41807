"""Test which of gRPC's own errors are logged."""

from __future__ import annotations

import logging
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn

import grpc
import pytest

from januslens_server.rpc.server import drop_failed_writes
from januslens_server.rpc.wire import serialized

WRITE = "Failed to write"


def outside(error: Exception, **_: object) -> NoReturn:
    raise error


def inside(error: Exception) -> None:
    """Raise the error through a function of the server."""
    message: Any = SimpleNamespace(SerializeToString=partial(outside, error))
    serialized(message)


@pytest.mark.parametrize(
    ("error", "raising", "kept"),
    [
        (grpc.aio.InternalError(WRITE), outside, False),
        (grpc.aio.InternalError(WRITE), inside, True),
        (grpc.aio.UsageError(WRITE), outside, True),
        (KeyError("InternalError"), outside, True),
    ],
)
def test_only_failed_writes_of_grpc_itself_are_dropped(
    error: Exception, raising: Any, kept: bool
) -> None:
    with pytest.raises(type(error)) as raised:
        raising(error)
    trace = (raised.type, raised.value, raised.tb)
    record = logging.LogRecord("grpc", logging.ERROR, "", 0, "unexpected", None, trace)
    assert drop_failed_writes(record) is kept


def test_records_without_an_exception_are_kept() -> None:
    assert drop_failed_writes(logging.LogRecord("grpc", logging.ERROR, "", 0, "text", None, None))
