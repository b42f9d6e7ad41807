"""Errors become the statuses and details that docs/errors.md documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from januslens.v1 import cost_pb2
from januslens_server import errors
from januslens_server.rpc.call import code_of_cancellation
from januslens_server.rpc.status import STATUS, TEXT_BYTES, shortened, status_of

PAGE = Path(__file__).parents[3] / "docs" / "errors.md"
GROUPS = {errors.IntrospectionError, errors.TryLater}


def tree(root: type[errors.IntrospectionError]) -> Iterator[type[errors.IntrospectionError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


# A class without a reason of its own is sent like its base class.
SENT = [
    kind
    for kind in tree(errors.IntrospectionError)
    if "reason" in vars(kind) and kind not in GROUPS
]


def raised(kind: type[errors.IntrospectionError]) -> errors.IntrospectionError:
    if issubclass(kind, errors.InvalidRequest):
        return kind("a.b[3]", "expected x, got y")
    if issubclass(kind, errors.LimitExceeded):
        seconds, stream = errors.CostLimit.MAX_REQUEST_SECONDS, errors.CostLimit.MAX_REQUEST_STREAM
        return kind(
            [
                errors.LimitViolation(seconds, 5.0, 7.0, "7 s of 5 s"),
                errors.LimitViolation(stream, 2.0**40, 2.0**41, "2 TiB of 1 TiB"),
            ]
        )
    if issubclass(kind, errors.QuotaSpent):
        return kind("ada", "3 requests a minute", 20.0)
    if kind is errors.DeviceLost:
        return errors.DeviceLost()
    return kind("the text")


def detail(status: status_pb2.Status, kind: type[Any]) -> Any:
    for packed in status.details:
        found = kind()
        if packed.Unpack(found):
            return found
    return None


def sent(error: Exception) -> status_pb2.Status:
    """Return the google.rpc.Status in the trailing metadata of an error's status."""
    status = status_of(error, "id-1")
    ((key, value),) = status.trailing_metadata
    assert key == "grpc-status-details-bin"
    message = status_pb2.Status.FromString(value)
    assert (message.code, message.message) == (status.code.value[0], status.details)
    return message


def code_of(status: status_pb2.Status) -> grpc.StatusCode:
    return next(code for code in grpc.StatusCode if code.value[0] == status.code)


def documented() -> dict[str, tuple[str, str]]:
    """Return status and details by reason, as in docs/errors.md."""
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|[^|]*\|([^|]*)\|", PAGE.read_text(), re.MULTILINE)
    return {reason: (status, details.strip("` ")) for reason, status, details in rows}


def test_the_page_documents_every_reason_and_no_other() -> None:
    assert set(documented()) == {kind.reason for kind in SENT} | {"INTERNAL"}


def test_reasons_are_unique() -> None:
    assert len({kind.reason for kind in SENT}) == len(SENT)
    every = [kind for kind in tree(errors.IntrospectionError) if kind not in GROUPS]
    assert {kind.reason for kind in every} == {kind.reason for kind in SENT}


@pytest.mark.parametrize("kind", SENT, ids=lambda kind: kind.__name__)
def test_an_error_becomes_its_documented_status(kind: type[errors.IntrospectionError]) -> None:
    assert kind in STATUS
    error = raised(kind)
    status = sent(error)
    info = detail(status, error_details_pb2.ErrorInfo)
    code, details = documented()[kind.reason]
    assert code_of(status).name == code
    assert status.message == str(error)
    assert (info.reason, info.domain) == (kind.reason, "januslens")
    assert info.metadata == {"request_id": "id-1"}
    names = {packed.TypeName() for packed in status.details} - {"google.rpc.ErrorInfo"}
    assert {name.rpartition(".")[2] for name in names} == set(re.findall(r"\w+", details))


def test_every_exceeded_limit_is_reported_with_both_figures() -> None:
    status = sent(raised(errors.LimitExceeded))
    violations = detail(status, cost_pb2.LimitViolations).violations
    assert [(cost_pb2.CostLimit.Name(v.limit), v.allowed, v.estimated) for v in violations] == [
        ("COST_LIMIT_MAX_REQUEST_SECONDS", 5.0, 7.0),
        ("COST_LIMIT_MAX_REQUEST_STREAM", 2.0**40, 2.0**41),
    ]
    assert "7 s of 5 s and 2 TiB of 1 TiB" in status.message


def test_the_contract_knows_every_limit() -> None:
    numbers = {f"COST_LIMIT_{limit.name}" for limit in errors.CostLimit}
    assert {"COST_LIMIT_UNSPECIFIED", *numbers} == set(cost_pb2.CostLimit.keys())


def test_an_invalid_field_is_reported_with_its_path() -> None:
    status = sent(errors.InvalidRequest("a.b[3]", "expected x, got y"))
    (violation,) = detail(status, error_details_pb2.BadRequest).field_violations
    assert (violation.field, violation.description) == ("a.b[3]", "expected x, got y")
    assert status.message == "a.b[3]: expected x, got y"


def test_retryable_errors_have_a_retry_delay() -> None:
    status = sent(errors.QueueFull("full", retry_after=0.25))
    retry = detail(status, error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToTimedelta().total_seconds() == 0.25
    assert code_of(status) is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("error", [ValueError("secret"), KeyError("secret"), OSError(2, "secret")])
def test_other_exceptions_become_internal_without_their_text(error: Exception) -> None:
    status = sent(error)
    info = detail(status, error_details_pb2.ErrorInfo)
    assert code_of(status) is grpc.StatusCode.INTERNAL
    assert status.message == "internal error; give the operator this request id: id-1"
    assert (info.reason, info.metadata) == ("INTERNAL", {"request_id": "id-1"})
    assert "secret" not in str(status)
    assert b"secret" not in status.SerializeToString()


@pytest.mark.parametrize("text", ["x" * 10**6, "é" * 10**6, "鷗" * 10**6, "\udcff" * 10**6])
def test_a_long_text_is_cut_between_characters(text: str) -> None:
    status = sent(errors.ModelNotFound(text))
    assert len(status.message.encode()) <= TEXT_BYTES + len(" ...")
    assert status.message.endswith(" ...")
    assert set(status.message.removesuffix(" ...")) <= {text[0], "?"}
    # Each text is sent three times: twice in the details, once percent-encoded; clients accept 8
    # KiB.
    named = sent(errors.InvalidRequest("field", text))
    assert len(named.SerializeToString()) * 4 / 3 + 3 * len(named.message.encode()) < 8000


def test_a_short_text_is_unchanged() -> None:
    assert shortened("x" * TEXT_BYTES) == "x" * TEXT_BYTES
    assert shortened("") == ""


@pytest.mark.parametrize(
    ("left", "code"),
    [
        (None, grpc.StatusCode.CANCELLED),
        (5.0, grpc.StatusCode.CANCELLED),
        (0.02, grpc.StatusCode.DEADLINE_EXCEEDED),
        (0.0, grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
def test_call_ended_by_its_client_near_the_deadline_counts_as_expired(
    left: float | None, code: grpc.StatusCode
) -> None:
    assert code_of_cancellation(left) is code
