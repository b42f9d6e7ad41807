"""What a call can raise.

The tree::

    JanuslensError
    |-- InvalidRequest          INVALID_ARGUMENT, OUT_OF_RANGE: change the request
    |-- NotFound                NOT_FOUND
    |   `-- ModelNotFound       ... and it was the model or its revision
    |-- ModelFailed             FAILED_PRECONDITION: it did not load, or failed its self-check
    |-- Unavailable             UNAVAILABLE: no server there, or it asks to try later
    |-- ResourceExhausted       RESOURCE_EXHAUSTED: cost limit, queue, quota or memory
    |-- DeadlineExceeded        DEADLINE_EXCEEDED
    |-- Cancelled               CANCELLED
    |-- Aborted                 ABORTED: the stream was read too slowly
    |-- Unauthenticated         UNAUTHENTICATED: no token, or a wrong one
    |-- PermissionDenied        PERMISSION_DENIED: a valid token without the scope
    |-- Unimplemented           UNIMPLEMENTED: this server does not offer the call
    |-- InternalError           INTERNAL, UNKNOWN, DATA_LOSS: a bug; report the request id
    |-- StreamInterrupted       the stream ended without its summary: `partial` is what came
    |   |-- TraceInterrupted
    |   `-- GradientInterrupted
    `-- ProtocolViolation       the stream broke the contract; report the request id

Arguments that no server could accept raise ValueError or TypeError before anything is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial


@dataclass(frozen=True)
class FieldViolation:
    """One request field (a path such as `input.prompt`) and why it was refused."""

    field: str
    description: str


@dataclass(frozen=True)
class QuotaViolation:
    """One exceeded limit: whose or what it counts, and the limit and the actual figure."""

    subject: str
    description: str


@dataclass(frozen=True)
class ErrorDetails:
    """What the server said beside its message.

    Attributes:
        code: The gRPC status by name, e.g. `"INVALID_ARGUMENT"`.
        reason: Stable across releases, e.g. `"MODEL_NOT_FOUND"`; empty if the server gave none.
        request_id: What to quote when asking about this call.
        field_violations: The request fields that were refused.
        quota_violations: The limits that were exceeded.
        retry_after: Seconds after which the same call may succeed; None = do not repeat it.
        metadata: Further figures, by the names that docs/errors.md gives them.
    """

    code: str
    reason: str = ""
    request_id: str = ""
    field_violations: tuple[FieldViolation, ...] = ()
    quota_violations: tuple[QuotaViolation, ...] = ()
    retry_after: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


class JanuslensError(Exception):
    """A call failed. `partial` holds what a stream had brought until then, else None."""

    def __init__(self, message: str, details: ErrorDetails, partial: object = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        self.partial = partial

    def __reduce__(self) -> tuple[partial[JanuslensError], tuple[()]]:
        """Exceptions cross process boundaries too, e.g. from a pool of workers."""
        return partial(type(self), self.message, self.details, self.partial), ()

    @property
    def code(self) -> str:
        """The gRPC status by name."""
        return self.details.code

    @property
    def reason(self) -> str:
        """The stable reason, or an empty string."""
        return self.details.reason

    @property
    def request_id(self) -> str:
        """What to quote when asking about this call."""
        return self.details.request_id

    @property
    def field_violations(self) -> tuple[FieldViolation, ...]:
        """The request fields that were refused."""
        return self.details.field_violations

    @property
    def quota_violations(self) -> tuple[QuotaViolation, ...]:
        """The limits that were exceeded."""
        return self.details.quota_violations

    @property
    def retry_after(self) -> float | None:
        """Seconds after which the same call may succeed; None = do not repeat it."""
        return self.details.retry_after

    @property
    def metadata(self) -> Mapping[str, str]:
        """Further figures of the server's."""
        return self.details.metadata


class InvalidRequest(JanuslensError):
    """The request must be changed; `field_violations` says where."""


class NotFound(JanuslensError):
    """What the request names does not exist."""


class ModelNotFound(NotFound):
    """No resident model has this name, or not this revision."""


class ModelFailed(JanuslensError):
    """The model did not load, or did not pass its self-check."""


class Unavailable(JanuslensError):
    """No server answered, or it asks to try again after `retry_after` seconds."""


class ResourceExhausted(JanuslensError):
    """Too large, or too many at once; only with a `retry_after` is it worth repeating."""


class DeadlineExceeded(JanuslensError):
    """The call's timeout passed; the server has stopped computing."""


class Cancelled(JanuslensError):
    """The call was cancelled."""


class Aborted(JanuslensError):
    """The stream was read too slowly and the server gave it up."""


class Unauthenticated(JanuslensError):
    """The server wants a token, or another one."""


class PermissionDenied(JanuslensError):
    """The token is valid but not for this."""


class Unimplemented(JanuslensError):
    """This server does not offer the call."""


class InternalError(JanuslensError):
    """A bug of the server's; its log knows the `request_id`."""


class StreamInterrupted(JanuslensError):
    """The stream ended without its summary; `partial` is incomplete, or None before the header.

    The server or the way to it was lost. Nothing is wrong with the request: a client with
    `resume=True` asks another replica for the rest.
    """


class TraceInterrupted(StreamInterrupted):
    """A trace was cut; `partial` is the `Trace` of the layers that came."""


class GradientInterrupted(StreamInterrupted):
    """A gradient lens was cut; `partial` is the `Gradient` of the matrices that came."""


class ProtocolViolation(JanuslensError):
    """The stream is not one that the contract allows, e.g. a message is missing."""
