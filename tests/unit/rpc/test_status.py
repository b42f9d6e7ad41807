"""Every error of ours becomes the status that docs/errors.md documents, with its details."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from januslens_server import errors
from januslens_server.rpc.status import STATUS, TEXT_BYTES, code_of, shortened, status_of

PAGE = Path(__file__).parents[3] / "docs" / "errors.md"
GROUPS = {errors.IntrospectionError, errors.TryLater}


def tree(root: type[errors.IntrospectionError]) -> Iterator[type[errors.IntrospectionError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


SENT = [kind for kind in tree(errors.IntrospectionError) if kind not in GROUPS]


def raised(kind: type[errors.IntrospectionError]) -> errors.IntrospectionError:
    if issubclass(kind, errors.InvalidRequest):
        return kind("a.b[3]", "expected x, got y")
    if issubclass(kind, errors.LimitExceeded):
        return kind("max_request_seconds", "5 s", "7 s")
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


def documented() -> dict[str, tuple[str, str]]:
    """Status and details by reason, as the page has them."""
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|[^|]*\|([^|]*)\|", PAGE.read_text(), re.MULTILINE)
    return {reason: (status, details.strip("` ")) for reason, status, details in rows}


def test_the_page_documents_every_reason_and_no_other() -> None:
    assert set(documented()) == {kind.reason for kind in SENT} | {"INTERNAL"}


def test_reasons_are_told_apart() -> None:
    assert len({kind.reason for kind in tree(errors.IntrospectionError)}) == len(SENT) + len(GROUPS)


@pytest.mark.parametrize("kind", SENT, ids=lambda kind: kind.__name__)
def test_an_error_becomes_its_documented_status(kind: type[errors.IntrospectionError]) -> None:
    assert kind in STATUS
    error = raised(kind)
    status = status_of(error, "id-1")
    info = detail(status, error_details_pb2.ErrorInfo)
    code, details = documented()[kind.reason]
    assert code_of(status).name == code
    assert status.message == str(error)
    assert (info.reason, info.domain) == (kind.reason, "januslens")
    assert info.metadata == {"request_id": "id-1"}
    names = {packed.TypeName() for packed in status.details} - {"google.rpc.ErrorInfo"}
    assert names == {f"google.rpc.{name}" for name in re.findall(r"\w+", details)}


def test_a_field_comes_with_its_path() -> None:
    status = status_of(errors.InvalidRequest("a.b[3]", "expected x, got y"), "id-1")
    (violation,) = detail(status, error_details_pb2.BadRequest).field_violations
    assert (violation.field, violation.description) == ("a.b[3]", "expected x, got y")
    assert status.message == "a.b[3]: expected x, got y"


def test_what_may_be_repeated_says_when() -> None:
    status = status_of(errors.QueueFull("full", retry_after=0.25), "id-1")
    retry = detail(status, error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToTimedelta().total_seconds() == 0.25
    assert code_of(status) is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("error", [ValueError("secret"), KeyError("secret"), OSError(2, "secret")])
def test_what_is_not_ours_is_internal_without_a_text(error: Exception) -> None:
    status = status_of(error, "id-1")
    info = detail(status, error_details_pb2.ErrorInfo)
    assert code_of(status) is grpc.StatusCode.INTERNAL
    assert status.message == "internal error; give the operator this request id: id-1"
    assert (info.reason, info.metadata) == ("INTERNAL", {"request_id": "id-1"})
    assert "secret" not in str(status)
    assert b"secret" not in status.SerializeToString()


@pytest.mark.parametrize("text", ["x" * 10**6, "é" * 10**6, "鷗" * 10**6, "\udcff" * 10**6])
def test_a_long_text_is_cut_between_characters(text: str) -> None:
    status = status_of(errors.ModelNotFound(text), "id-1")
    assert len(status.message.encode()) <= TEXT_BYTES + len(" ...")
    assert status.message.endswith(" ...")
    assert set(status.message.removesuffix(" ...")) <= {text[0], "?"}
    # Twice in the details and once, percent-encoded, beside them: 8 KiB are what clients take.
    named = status_of(errors.InvalidRequest("field", text), "id-1")
    assert len(named.SerializeToString()) * 4 / 3 + 3 * len(named.message.encode()) < 8000


def test_a_short_text_stays_as_it_is() -> None:
    assert shortened("x" * TEXT_BYTES) == "x" * TEXT_BYTES
    assert shortened("") == ""
