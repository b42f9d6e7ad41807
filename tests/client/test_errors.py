"""Test which exception a failed call raises."""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

import januslens
from januslens import errors
from januslens._connection import exception_from, was_cut

DETAILS = "grpc-status-details-bin"


@dataclass(frozen=True)
class Failure:
    """A failed call, with gRPC's interface."""

    status: grpc.StatusCode
    message: str | None = "something happened"
    trailing: Sequence[tuple[str, str | bytes]] | None = ()
    initial: Sequence[tuple[str, str | bytes]] | None = ()

    def code(self) -> grpc.StatusCode:
        return self.status

    def details(self) -> str | None:
        return self.message

    def initial_metadata(self) -> Sequence[tuple[str, str | bytes]] | None:
        return self.initial

    def trailing_metadata(self) -> Sequence[tuple[str, str | bytes]] | None:
        return self.trailing


def with_details(code: grpc.StatusCode, *details: Message) -> Failure:
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    status = status_pb2.Status(code=code.value[0], message="m", details=packed)
    return Failure(code, "m", [("x-other", "y"), (DETAILS, status.SerializeToString())])


def raised(failure: Failure) -> januslens.JanuslensError:
    return exception_from(failure, "r1", "host:1")


def test_a_missing_token_names_the_argument_of_the_client() -> None:
    refused = "missing bearer token; send the metadata 'authorization: Bearer <token>'"
    error = raised(Failure(grpc.StatusCode.UNAUTHENTICATED, refused))
    assert str(error).startswith(f"{refused}; in Python, set token=")


BEGUN = [("x-request-id", "r1")]
LOST = grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("failure", "cut"),
    [
        (Failure(LOST, "Socket closed", initial=BEGUN), True),
        (Failure(LOST, "Socket closed"), False),  # gRPC has repeated it
        (Failure(LOST, "Received http2 header with status: 502"), True),
        (Failure(LOST, "Received http2 header with status: 503"), False),
        (Failure(grpc.StatusCode.INTERNAL, "RST_STREAM", initial=BEGUN), True),
        (Failure(grpc.StatusCode.CANCELLED, "Received RST_STREAM", initial=BEGUN), True),
        (Failure(grpc.StatusCode.CANCELLED, "Locally cancelled", initial=BEGUN), False),
        (Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "late", initial=BEGUN), False),
        (Failure(grpc.StatusCode.INVALID_ARGUMENT, "wrong", initial=BEGUN), False),
    ],
)
def test_lost_server_is_distinguished_from_a_refusal(failure: Failure, cut: bool) -> None:
    assert was_cut(failure) is cut
    error = raised(failure)
    assert (error.retry_after == 0.0) is cut
    stream = exception_from(failure, "r1", "host:1", None, januslens.TraceInterrupted)
    assert isinstance(stream, januslens.TraceInterrupted) is cut


def test_status_of_the_server_is_not_an_interruption() -> None:
    told = with_details(LOST, error_details_pb2.ErrorInfo(reason="SERVER_DRAINING"))
    assert not was_cut(dataclasses.replace(told, initial=BEGUN))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("INVALID_ARGUMENT", januslens.InvalidRequest),
        ("OUT_OF_RANGE", januslens.InvalidRequest),
        ("NOT_FOUND", januslens.NotFound),
        ("FAILED_PRECONDITION", errors.FailedPrecondition),
        ("UNAVAILABLE", januslens.Unavailable),
        ("RESOURCE_EXHAUSTED", januslens.ResourceExhausted),
        ("DEADLINE_EXCEEDED", januslens.DeadlineExceeded),
        ("CANCELLED", januslens.Cancelled),
        ("ABORTED", januslens.Aborted),
        ("UNAUTHENTICATED", januslens.Unauthenticated),
        ("PERMISSION_DENIED", januslens.PermissionDenied),
        ("UNIMPLEMENTED", januslens.Unimplemented),
        ("INTERNAL", januslens.InternalError),
        ("UNKNOWN", januslens.InternalError),
        ("DATA_LOSS", januslens.InternalError),
    ],
)
def test_every_status_has_its_exception(code: str, kind: type[januslens.JanuslensError]) -> None:
    error = raised(Failure(grpc.StatusCode[code]))
    assert type(error) is kind
    assert error.code == code
    assert error.request_id == "r1"
    assert "something happened" in str(error)


def test_the_details_are_read() -> None:
    info = error_details_pb2.ErrorInfo(
        reason="PROMPT_TOO_LONG", domain="januslens", metadata={"limit": "64"}
    )
    bad_request = error_details_pb2.BadRequest()
    bad_request.field_violations.add(field="input.prompt", description="70 tokens")
    quota = error_details_pb2.QuotaFailure()
    quota.violations.add(subject="cost", description="9 > 8")
    retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=500_000_000))
    error = raised(with_details(grpc.StatusCode.INVALID_ARGUMENT, info, bad_request, quota, retry))
    assert error.reason == "PROMPT_TOO_LONG"
    assert error.metadata == {"limit": "64"}
    assert error.field_violations == (januslens.FieldViolation("input.prompt", "70 tokens"),)
    assert error.quota_violations == (januslens.QuotaViolation("cost", "9 > 8"),)
    assert error.retry_after == 0.5


def test_retry_delay_of_zero_is_distinguished_from_none() -> None:
    at_once = with_details(grpc.StatusCode.UNAVAILABLE, error_details_pb2.RetryInfo())
    assert raised(at_once).retry_after == 0.0
    assert raised(Failure(grpc.StatusCode.RESOURCE_EXHAUSTED)).retry_after is None


def test_unknown_model_raises_model_not_found() -> None:
    info = error_details_pb2.ErrorInfo(reason="MODEL_NOT_FOUND")
    assert type(raised(with_details(grpc.StatusCode.NOT_FOUND, info))) is januslens.ModelNotFound


def documented_reasons() -> dict[str, str]:
    """Return the reasons in docs/errors.md with their statuses."""
    page = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
    return dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", page, re.MULTILINE))


def test_every_documented_reason_has_an_exception_of_its_own() -> None:
    reasons = documented_reasons()
    assert len(reasons) > 15
    raised_for = {}
    for reason, code in reasons.items():
        info = error_details_pb2.ErrorInfo(reason=reason)
        raised_for[reason] = type(raised(with_details(grpc.StatusCode[code], info)))
        assert issubclass(raised_for[reason], errors.BY_STATUS.get(code, errors.InternalError))
    assert len(set(raised_for.values())) == len(reasons)


def test_not_finite_is_not_a_model_failed() -> None:
    info = error_details_pb2.ErrorInfo(reason="NOT_FINITE")
    error = raised(with_details(grpc.StatusCode.FAILED_PRECONDITION, info))
    assert type(error) is januslens.NotFinite
    assert not isinstance(error, januslens.ModelFailed)


def test_an_unknown_reason_falls_back_to_its_status() -> None:
    info = error_details_pb2.ErrorInfo(reason="OF_A_NEWER_SERVER")
    error = raised(with_details(grpc.StatusCode.RESOURCE_EXHAUSTED, info))
    assert type(error) is januslens.ResourceExhausted


def test_unreachable_server_is_named() -> None:
    error = raised(Failure(grpc.StatusCode.UNAVAILABLE, "connection refused"))
    assert str(error) == "no answer from host:1: connection refused"
    told = with_details(
        grpc.StatusCode.UNAVAILABLE, error_details_pb2.ErrorInfo(reason="SERVER_DRAINING")
    )
    assert str(raised(told)) == "m"


@pytest.mark.parametrize("trailing", [None, (), [(DETAILS, b"\xff\xff")], [(DETAILS, "text")]])
def test_unreadable_details_keep_status_and_message(
    trailing: Sequence[tuple[str, str | bytes]] | None,
) -> None:
    error = raised(Failure(grpc.StatusCode.INVALID_ARGUMENT, "m", trailing))
    assert (error.message, error.reason, error.field_violations) == ("m", "", ())


def test_a_status_without_message_is_named_by_its_code() -> None:
    assert str(raised(Failure(grpc.StatusCode.ABORTED, None))) == "ABORTED"


def test_exceptions_cross_process_boundaries() -> None:
    error = raised(with_details(grpc.StatusCode.UNAVAILABLE, error_details_pb2.RetryInfo()))
    back = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(back) is januslens.Unavailable
    assert (str(back), back.details) == (str(error), error.details)


def test_docstring_shows_the_exception_hierarchy() -> None:
    drawn = errors.__doc__ or ""
    for name in januslens.__all__:
        kind = getattr(januslens, name)
        if isinstance(kind, type) and issubclass(kind, januslens.JanuslensError):
            assert kind.__name__ in drawn
