"""Which gRPC status each error becomes, and the details that travel with it."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from januslens_server import errors

DOMAIN = "januslens"
DETAILS_KEY = "grpc-status-details-bin"

# Clients refuse more than 8 KiB of metadata, and a text is in it three times, one of them
# percent-encoded: a longer one, quoting the caller's own words, would lose the whole status.
TEXT_BYTES = 1000

# Nearest class first: an error is looked up along its class's bases.
STATUS: dict[type[Exception], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.LimitExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ModelNotFound: grpc.StatusCode.NOT_FOUND,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.ModelFailed: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ModelLoading: grpc.StatusCode.UNAVAILABLE,
    errors.ServerDraining: grpc.StatusCode.UNAVAILABLE,
    errors.QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.QuotaSpent: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.OutOfMemory: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeviceLost: grpc.StatusCode.UNAVAILABLE,
    errors.NotFinite: grpc.StatusCode.FAILED_PRECONDITION,
    errors.DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.RequestCancelled: grpc.StatusCode.CANCELLED,
    errors.ReaderStalled: grpc.StatusCode.ABORTED,
}


def status_of(error: Exception, request_id: str) -> status_pb2.Status:
    """The error as google.rpc.Status; a bug of ours shows the request id and nothing else."""
    for base in type(error).__mro__:
        if base in STATUS and isinstance(error, errors.IntrospectionError):
            text, details = shortened(str(error)), _details(error)
            return _status(STATUS[base], text, error.reason, request_id, details)
    message = f"internal error; give the operator this request id: {request_id}"
    return _status(grpc.StatusCode.INTERNAL, message, "INTERNAL", request_id, [])


def _status(
    code: grpc.StatusCode, message: str, reason: str, request_id: str, details: list[Message]
) -> status_pb2.Status:
    number: int = code.value[0]
    info = error_details_pb2.ErrorInfo(
        reason=reason, domain=DOMAIN, metadata={"request_id": request_id}
    )
    packed = [any_pb2.Any() for _ in range(1 + len(details))]
    for target, detail in zip(packed, [info, *details], strict=True):
        target.Pack(detail)
    return status_pb2.Status(code=number, message=message, details=packed)


def _details(error: errors.IntrospectionError) -> list[Message]:
    if isinstance(error, errors.InvalidRequest):
        violations = [
            error_details_pb2.BadRequest.FieldViolation(
                field=v.field, description=shortened(v.description)
            )
            for v in error.violations
        ]
        return [error_details_pb2.BadRequest(field_violations=violations)]
    if isinstance(error, errors.TryLater):
        delay = duration_pb2.Duration(nanos=0)
        delay.FromMilliseconds(milliseconds(error.retry_after))
        return [error_details_pb2.RetryInfo(retry_delay=delay), *_quota_details(error)]
    return []


def _quota_details(error: errors.TryLater) -> list[Message]:
    if not isinstance(error, errors.QuotaSpent):
        return []
    violation = error_details_pb2.QuotaFailure.Violation(
        subject=f"caller:{error.caller}", description=f"at most {error.quota}"
    )
    return [error_details_pb2.QuotaFailure(violations=[violation])]


def milliseconds(seconds: float) -> int:
    """As retry pauses are sent."""
    return round(1000 * seconds)


def shortened(text: str, limit: int = TEXT_BYTES) -> str:
    """The text itself, or its first `limit` bytes of UTF-8 and an ellipsis."""
    encoded = text.encode(errors="replace")  # a path's stray bytes cannot travel
    whole = len(encoded) <= limit
    return encoded[:limit].decode(errors="ignore") + ("" if whole else " ...")


def code_of(status: status_pb2.Status) -> grpc.StatusCode:
    """The status's code as grpc names it."""
    return next(code for code in grpc.StatusCode if code.value[0] == status.code)
