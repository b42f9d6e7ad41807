"""What can go wrong with a request, in the service's own terms.

The tree (the `rpc` package alone knows which gRPC status each becomes)::

    IntrospectionError
    |-- InvalidRequest          the caller must change the request
    |-- LimitExceeded           it asks for more than the server gives to one request
    |-- ModelNotFound           no such model, or another revision than asked for
    |-- Unauthenticated         nobody that this server knows asks
    |-- PermissionDenied        the caller may not ask this
    |-- ModelFailed             the model did not load or did not pass its self-check
    |-- TryLater                nothing is wrong with the request
    |   |-- ModelLoading
    |   |-- ServerDraining
    |   |-- QueueFull
    |   |-- QuotaSpent
    |   |-- OutOfMemory
    |   `-- DeviceLost          until the process is started anew
    |-- NotFinite               the model overflows on this prompt
    |-- DeadlinePassed
    |-- RequestCancelled
    `-- ReaderStalled
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# Raises `RequestCancelled` or `DeadlinePassed` if the request that computes should stop. Long
# computations take one and call it often.
CancelCheck = Callable[[], None]


class IntrospectionError(Exception):
    """An error whose text is meant for the caller. `reason` is stable across releases."""

    reason = "INTROSPECTION_ERROR"


@dataclass(frozen=True)
class FieldViolation:
    """One request field that cannot be served as it came."""

    field: str
    description: str


class InvalidRequest(IntrospectionError):
    """The request cannot be served by this model, whatever the server's state."""

    reason = "INVALID_REQUEST"

    def __init__(self, field: str, description: str) -> None:
        """`field` is the path of the request field, `description` what to send instead."""
        super().__init__(f"{field}: {description}")
        self.violations = (FieldViolation(field, description),)


class LimitExceeded(IntrospectionError):
    """The request would cost more than the server gives to one; the text has both figures."""

    reason = "LIMIT_EXCEEDED"

    def __init__(self, limit: str, allowed: str, estimated: str) -> None:
        """`limit` is the setting's name."""
        super().__init__(
            f"expected at most {allowed} ({limit}), this request is estimated at {estimated}; "
            "ask for fewer layers, positions, parts or components"
        )
        self.limit = limit


class ModelNotFound(IntrospectionError):
    """No resident model has this name or this revision."""

    reason = "MODEL_NOT_FOUND"


class Unauthenticated(IntrospectionError):
    """The request shows no token, or none of a caller of this server."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(IntrospectionError):
    """The caller is known, and this RPC or this model is not in its scope."""

    reason = "PERMISSION_DENIED"


class ModelFailed(IntrospectionError):
    """The model is configured but cannot be served."""

    reason = "MODEL_FAILED"


class TryLater(IntrospectionError):
    """The request may be repeated unchanged after `retry_after` seconds."""

    reason = "TRY_LATER"

    def __init__(self, text: str, retry_after: float = 1.0) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class ModelLoading(TryLater):
    """The model's weights are still being read or checked."""

    reason = "MODEL_LOADING"


class ServerDraining(TryLater):
    """The server finishes what runs and takes nothing new."""

    reason = "SERVER_DRAINING"

    def __init__(self, text: str, retry_after: float = 0.1) -> None:
        super().__init__(text, retry_after)  # soon: another replica may be free now


class QueueFull(TryLater):
    """As many requests wait for the device as the server allows."""

    reason = "QUEUE_FULL"


class QuotaSpent(TryLater):
    """The caller has taken what the operator grants to it."""

    reason = "QUOTA_SPENT"

    def __init__(self, caller: str, quota: str, retry_after: float) -> None:
        """`quota` says what of, and how much."""
        text = f"expected at most {quota} of {caller}; try again in {retry_after:.3g} s"
        super().__init__(text, retry_after)
        self.caller = caller
        self.quota = quota


class OutOfMemory(TryLater):
    """The device had no memory left for this request."""

    reason = "OUT_OF_MEMORY"


class DeviceLost(TryLater):
    """The device computes no more: what another replica may still do."""

    reason = "DEVICE_LOST"

    def __init__(self) -> None:
        super().__init__(
            "the server's device does not compute any more; ask another replica", retry_after=10.0
        )


class NotFinite(IntrospectionError):
    """The model's own numbers for this prompt are infinite or none."""

    reason = "NOT_FINITE"


class DeadlinePassed(IntrospectionError):
    """The caller's deadline passed while the request waited or ran."""

    reason = "DEADLINE_PASSED"


class RequestCancelled(IntrospectionError):
    """The caller went away."""

    reason = "REQUEST_CANCELLED"


class ReaderStalled(IntrospectionError):
    """The caller did not read its stream for longer than the server waits."""

    reason = "READER_STALLED"
