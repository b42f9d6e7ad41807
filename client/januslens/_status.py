"""From a failed gRPC call to the exception that describes it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from januslens import errors

MessageT = TypeVar("MessageT", bound=Message)

_REQUEST_ID = "x-request-id"

# gRPC's words for an answer that is HTTP's and not gRPC's.
_BAD_GATEWAY = re.compile(r"http2 header with status: 50[24]")

_LOST = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}


class FailedCall(Protocol):
    """What grpc's sync and async errors have in common."""

    def code(self) -> grpc.StatusCode:
        """The status."""

    def details(self) -> str | None:
        """Its message."""

    def initial_metadata(self) -> Iterable[Any] | None:
        """What the server sent first, as pairs."""

    def trailing_metadata(self) -> Iterable[Any] | None:
        """What the server sent last, as pairs."""


def was_cut(call: FailedCall) -> bool:
    """Whether the server or the way to it was lost after the server had begun to answer.

    What the server itself says carries details; what proxies and gRPC say of a broken connection
    does not. A server's first headers say that it has begun: before them gRPC repeats the call.
    A proxy that lost the server before these answers 502 or 504 in its place, with headers of its
    own, which gRPC takes for the server's; it may have begun.
    """
    if not _broken(call):
        return False
    begun = any(key == _REQUEST_ID for key, _ in call.initial_metadata() or ())
    return begun or _BAD_GATEWAY.search(call.details() or "") is not None


def _broken(call: FailedCall) -> bool:
    if _packed_details(call):
        return False
    # Cancelled by a proxy, not by us.
    reset = call.code() is grpc.StatusCode.CANCELLED and "RST_STREAM" in (call.details() or "")
    return reset or call.code() in _LOST


def exception_from(
    call: FailedCall,
    request_id: str,
    address: str,
    partial: object = None,
    interrupted: type[errors.StreamInterrupted] | None = None,
) -> errors.JanuslensError:
    """The typed exception for a failed call, with every detail that the server gave.

    A stream of which something has come, or that the server had begun, is `interrupted` where the
    connection broke.
    """
    details = _error_details(call, request_id)
    begun = was_cut(call)
    if begun or (partial is not None and _broken(call)):
        details = replace(details, retry_after=0.0)
        if interrupted is not None:
            details = replace(details, reason="STREAM_INTERRUPTED")
            text = f"the stream was cut: {call.details() or call.code().name}"
            return interrupted(text, details, partial)
    by_status = errors.BY_STATUS.get(call.code().name, errors.InternalError)
    kind = errors.BY_REASON.get(details.reason, by_status)
    return kind(_message(call, details, address), details, partial)


def _message(call: FailedCall, details: errors.ErrorDetails, address: str) -> str:
    text = call.details() or call.code().name
    if call.code() is grpc.StatusCode.UNAVAILABLE and not details.reason:
        return f"no answer from {address}: {text}"
    return text


def _error_details(call: FailedCall, request_id: str) -> errors.ErrorDetails:
    packed = _packed_details(call)
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


def _packed_details(call: FailedCall) -> Sequence[Any]:
    """The details of the google.rpc.Status in the trailing metadata; none if it is not readable.

    A proxy may have changed the status, its text or the details; the status itself still holds.
    """
    try:
        status = rpc_status.from_call(call)
    except (DecodeError, TypeError, ValueError):
        return ()
    return () if status is None else status.details
