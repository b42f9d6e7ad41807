"""Map each error to a gRPC status with details (google.rpc.Status)."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from januslens.v1 import cost_pb2
from januslens_server import errors

DOMAIN = "januslens"

# Maximum bytes of an error's text. The metadata has the text three times, once percent-encoded, and
# clients reject the whole status if the metadata exceeds 8 KiB.
TEXT_BYTES = 1000

# An error has the code of its class, or of the nearest base class.
STATUS: dict[type[Exception], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.LimitExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ModelNotFound: grpc.StatusCode.NOT_FOUND,
    errors.RevisionNotFound: grpc.StatusCode.NOT_FOUND,
    errors.ModelExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.ModelFailed: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NoChatTemplate: grpc.StatusCode.FAILED_PRECONDITION,
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
    errors.RequestStalled: grpc.StatusCode.ABORTED,
}


def status_of(error: Exception, request_id: str) -> grpc.Status:
    """Return the status of an error, with its details in the trailing metadata.

    Other exceptions become INTERNAL, with a text that has only the request id.
    """
    status: grpc.Status = rpc_status.to_status(_message_of(error, request_id))
    return status


def _message_of(error: Exception, request_id: str) -> status_pb2.Status:
    if not isinstance(error, errors.IntrospectionError):
        text = f"internal error; give the operator this request id: {request_id}"
        return _message(grpc.StatusCode.INTERNAL, text, "INTERNAL", request_id, [])
    code = next(STATUS[base] for base in type(error).__mro__ if base in STATUS)
    return _message(code, shortened(str(error)), error.reason, request_id, _details(error))


def _message(
    code: grpc.StatusCode, text: str, reason: str, request_id: str, details: list[Message]
) -> status_pb2.Status:
    info = error_details_pb2.ErrorInfo(
        reason=reason, domain=DOMAIN, metadata={"request_id": request_id}
    )
    packed = [any_pb2.Any() for _ in range(1 + len(details))]
    for target, detail in zip(packed, [info, *details], strict=True):
        target.Pack(detail)
    return status_pb2.Status(code=code.value[0], message=text, details=packed)


def _details(error: errors.IntrospectionError) -> list[Message]:
    if isinstance(error, errors.InvalidRequest):
        limit = TEXT_BYTES // len(error.violations)
        violations = [
            error_details_pb2.BadRequest.FieldViolation(
                field=v.field, description=shortened(v.description, limit)
            )
            for v in error.violations
        ]
        return [error_details_pb2.BadRequest(field_violations=violations)]
    if isinstance(error, errors.LimitExceeded):
        return [cost_pb2.LimitViolations(violations=map(limit_message, error.violations))]
    if isinstance(error, errors.TryLater):
        delay = duration_pb2.Duration(nanos=0)
        delay.FromMilliseconds(milliseconds(error.retry_after))
        return [error_details_pb2.RetryInfo(retry_delay=delay), *_quota_details(error)]
    return []


def limit_message(violation: errors.LimitViolation) -> cost_pb2.LimitViolation:
    """Encode a limit that a request exceeds."""
    return cost_pb2.LimitViolation(
        limit=limit_number(violation.limit),
        allowed=violation.allowed,
        estimated=violation.estimated,
    )


def limit_number(limit: errors.CostLimit) -> cost_pb2.CostLimit.ValueType:
    """Return the contract's number of a limit."""
    return cost_pb2.CostLimit.Value(f"COST_LIMIT_{limit.name}")


def _quota_details(error: errors.TryLater) -> list[Message]:
    if not isinstance(error, errors.QuotaSpent):
        return []
    violation = error_details_pb2.QuotaFailure.Violation(
        subject=f"caller:{error.caller}", description=f"at most {error.quota}"
    )
    return [error_details_pb2.QuotaFailure(violations=[violation])]


def milliseconds(seconds: float) -> int:
    """Convert a retry delay to milliseconds."""
    return round(1000 * seconds)


def shortened(text: str, limit: int = TEXT_BYTES) -> str:
    """Truncate a text that is longer than `limit` bytes of UTF-8, and add an ellipsis."""
    encoded = text.encode(errors="replace")  # paths may have lone surrogates, which UTF-8 lacks
    cut = len(encoded) > limit
    return encoded[:limit].decode(errors="ignore") + (" ..." if cut else "")
