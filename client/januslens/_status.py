"""From a failed gRPC call to the exception that describes it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from januslens import _errors as errors

MessageT = TypeVar("MessageT", bound=Message)

_DETAILS_KEY = "grpc-status-details-bin"

_EXCEPTIONS: dict[grpc.StatusCode, type[errors.JanuslensError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidRequest,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: errors.ModelFailed,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.ResourceExhausted,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.ABORTED: errors.Aborted,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.UNIMPLEMENTED: errors.Unimplemented,
}


class FailedCall(Protocol):
    """What grpc's sync and async errors have in common."""

    def code(self) -> grpc.StatusCode:
        """The status."""

    def details(self) -> str | None:
        """Its message."""

    def trailing_metadata(self) -> Iterable[Any] | None:
        """What the server sent last, as pairs."""


def exception_from(
    call: FailedCall, request_id: str, address: str, partial: object = None
) -> errors.JanuslensError:
    """The typed exception for a failed call, with every detail that the server gave."""
    details = _error_details(call, request_id)
    kind = _EXCEPTIONS.get(call.code(), errors.InternalError)
    if kind is errors.NotFound and details.reason.startswith("MODEL"):
        kind = errors.ModelNotFound
    return kind(_message(call, details, address), details, partial)


def _message(call: FailedCall, details: errors.ErrorDetails, address: str) -> str:
    text = call.details() or call.code().name
    if call.code() is grpc.StatusCode.UNAVAILABLE and not details.reason:
        return f"no answer from {address}: {text}"
    return text


def _error_details(call: FailedCall, request_id: str) -> errors.ErrorDetails:
    packed = _status(call).details
    info = _unpacked(packed, error_details_pb2.ErrorInfo)
    bad_request = _unpacked(packed, error_details_pb2.BadRequest)
    quota = _unpacked(packed, error_details_pb2.QuotaFailure)
    retry = _unpacked(packed, error_details_pb2.RetryInfo)
    return errors.ErrorDetails(
        code=call.code().name,
        reason=info.reason if info else "",
        request_id=request_id,
        field_violations=tuple(
            errors.FieldViolation(v.field, v.description)
            for v in (bad_request.field_violations if bad_request else ())
        ),
        quota_violations=tuple(
            errors.QuotaViolation(v.subject, v.description)
            for v in (quota.violations if quota else ())
        ),
        retry_after=retry.retry_delay.ToTimedelta().total_seconds() if retry else None,
        metadata=dict(info.metadata) if info else {},
    )


def _unpacked(packed: Iterable[Any], kind: type[MessageT]) -> MessageT | None:
    """The detail of this kind; a status carries at most one of each."""
    for detail in packed:
        message = kind()
        if detail.Unpack(message):
            return message
    return None


def _status(call: FailedCall) -> status_pb2.Status:
    """The google.rpc.Status in the trailing metadata; an empty one if there is none to read."""
    status = status_pb2.Status()
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                status.ParseFromString(value)
            except DecodeError:  # a proxy's doing; the status itself still says what happened
                return status_pb2.Status()
    return status
