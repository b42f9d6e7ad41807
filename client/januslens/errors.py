"""The exceptions that a call can raise.

The tree, with the `reason` or the gRPC status of each::

    JanuslensError
    |-- InvalidRequest          INVALID_REQUEST: change the request
    |-- NotFound                NOT_FOUND
    |   `-- ModelNotFound       MODEL_NOT_FOUND
    |       `-- RevisionNotFound  REVISION_NOT_FOUND: the model has another revision
    |-- FailedPrecondition      FAILED_PRECONDITION
    |   |-- ModelFailed         MODEL_FAILED: it did not load, or failed its self-check
    |   |-- NoChatTemplate      NO_CHAT_TEMPLATE: send the conversation as text
    |   `-- NotFinite           NOT_FINITE: the model overflows on this prompt
    |-- Unavailable             UNAVAILABLE: no server answered
    |   |-- ModelLoading        MODEL_LOADING
    |   |-- ServerDraining      SERVER_DRAINING
    |   `-- DeviceLost          DEVICE_LOST
    |-- ResourceExhausted       RESOURCE_EXHAUSTED
    |   |-- LimitExceeded       LIMIT_EXCEEDED: request less
    |   |-- QueueFull           QUEUE_FULL
    |   |-- QuotaSpent          QUOTA_SPENT
    |   `-- OutOfMemory         OUT_OF_MEMORY
    |-- DeadlineExceeded        DEADLINE_PASSED
    |-- Cancelled               REQUEST_CANCELLED
    |-- Aborted                 ABORTED
    |   |-- ReaderStalled       READER_STALLED: the stream was read too slowly
    |   `-- RequestStalled      REQUEST_STALLED: the request was sent too slowly
    |-- ModelExists             MODEL_EXISTS: unload that model first, or choose another name
    |-- Unauthenticated         UNAUTHENTICATED
    |-- PermissionDenied        PERMISSION_DENIED
    |-- Unimplemented           UNIMPLEMENTED: the server does not offer the call
    |-- InternalError           INTERNAL: a bug; report the request id
    |-- StreamInterrupted       the stream ended before its summary; `partial` has what arrived
    |   |-- TraceInterrupted
    |   |-- GradientInterrupted
    |   |-- ActivationsInterrupted
    |   |-- InterveneInterrupted
    |   `-- GenerationInterrupted
    `-- ProtocolViolation       the stream breaks the contract; report the request id

Arguments that no server could accept raise ValueError or TypeError before anything is sent.
`januslens.launch` raises LaunchError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from januslens.v1 import cost_pb2


@dataclass(frozen=True)
class FieldViolation:
    """A request field (a path such as `input.prompt`) and why it was refused."""

    field: str
    description: str


@dataclass(frozen=True)
class QuotaViolation:
    """An exceeded limit: its subject, and the limit and the actual figure."""

    subject: str
    description: str


@dataclass(frozen=True)
class LimitViolation:
    """A limit of the server on the cost of a request, and by how much it is exceeded.

    Attributes:
        limit: The setting of the server, such as `max_request_seconds`; or `free_memory`, or
            `preparation_seconds`.
        allowed: What the limit allows, in seconds or bytes.
        estimated: What the request needs by estimate, in the same unit.
    """

    limit: str
    allowed: float
    estimated: float

    @classmethod
    def from_message(cls, message: cost_pb2.LimitViolation) -> LimitViolation:
        """Read the message."""
        return cls(limit_name(message.limit), message.allowed, message.estimated)


def limit_name(number: int) -> str:
    """Return the name of a limit, such as `max_request_seconds`; its number if it is unknown."""
    known = cost_pb2.CostLimit.DESCRIPTOR.values_by_number
    name: str = known[number].name if number in known else str(number)
    return name.removeprefix("COST_LIMIT_").lower()


@dataclass(frozen=True)
class ErrorDetails:
    """The details of a failed call.

    Attributes:
        code: The gRPC status by name, e.g. `"INVALID_ARGUMENT"`.
        reason: Stable across releases, e.g. `"MODEL_NOT_FOUND"`; empty if there is none.
        request_id: Identifies the call in the server's log.
        field_violations: The request fields that were refused.
        quota_violations: The caller's quotas that were exceeded.
        limit_violations: The limits on the cost of a request that were exceeded.
        retry_after: Seconds after which the same call may succeed; None = do not repeat it.
        metadata: Further details by name; docs/errors.md lists the names.
    """

    code: str
    reason: str = ""
    request_id: str = ""
    field_violations: tuple[FieldViolation, ...] = ()
    quota_violations: tuple[QuotaViolation, ...] = ()
    limit_violations: tuple[LimitViolation, ...] = ()
    retry_after: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


class JanuslensError(Exception):
    """A call failed; `partial` is the received part of a stream, or None."""

    def __init__(self, message: str, details: ErrorDetails, partial: object = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        self.partial = partial

    def __reduce__(self) -> tuple[partial[JanuslensError], tuple[()]]:
        """Support pickling, e.g. from a pool of workers."""
        return partial(type(self), self.message, self.details, self.partial), ()

    @property
    def code(self) -> str:
        """The gRPC status by name."""
        return self.details.code

    @property
    def reason(self) -> str:
        """The stable reason, e.g. `"QUEUE_FULL"`, or an empty string."""
        return self.details.reason

    @property
    def request_id(self) -> str:
        """Identifies the call in the server's log."""
        return self.details.request_id

    @property
    def field_violations(self) -> tuple[FieldViolation, ...]:
        """The request fields that were refused."""
        return self.details.field_violations

    @property
    def quota_violations(self) -> tuple[QuotaViolation, ...]:
        """The caller's quotas that were exceeded."""
        return self.details.quota_violations

    @property
    def limit_violations(self) -> tuple[LimitViolation, ...]:
        """The limits on the cost of a request that were exceeded."""
        return self.details.limit_violations

    @property
    def retry_after(self) -> float | None:
        """Seconds after which the same call may succeed; None = do not repeat it."""
        return self.details.retry_after

    @property
    def metadata(self) -> Mapping[str, str]:
        """Further details by name; docs/errors.md lists the names."""
        return self.details.metadata


class InvalidRequest(JanuslensError):
    """The request must be changed; `field_violations` names the fields."""


class NotFound(JanuslensError):
    """Something that the request names does not exist."""


class ModelNotFound(NotFound):
    """No configured model has this name."""


class RevisionNotFound(ModelNotFound):
    """The model has another revision than the request requires."""


class ModelExists(JanuslensError):
    """The name of a model to load belongs to another model, or to one that is being unloaded."""


class FailedPrecondition(JanuslensError):
    """The server cannot serve the request in its present state; retrying does not help."""


class ModelFailed(FailedPrecondition):
    """The model did not load, or did not pass its self-check."""


class NoChatTemplate(FailedPrecondition):
    """The model's tokenizer has no chat template, or one that the server cannot use."""


class NotFinite(FailedPrecondition):
    """The model's activations or gradients for this prompt are infinite or NaN."""


class Unavailable(JanuslensError):
    """No server answered, or the server asks for a retry after `retry_after` seconds."""


class ModelLoading(Unavailable):
    """The model is still loading; retry after `retry_after` seconds."""


class ServerDraining(Unavailable):
    """The server is shutting down and takes no new requests."""


class DeviceLost(Unavailable):
    """The server's device has failed; the server must be restarted."""


class ResourceExhausted(JanuslensError):
    """The request is too large, or there are too many; retry only if `retry_after` is set."""


class LimitExceeded(ResourceExhausted):
    """The request costs more than the server grants to one request."""


class QueueFull(ResourceExhausted):
    """The server's queue is full; retry after `retry_after` seconds."""


class QuotaSpent(ResourceExhausted):
    """The caller has used up its quota; retry after `retry_after` seconds."""


class OutOfMemory(ResourceExhausted):
    """The device had too little free memory for this request."""


class DeadlineExceeded(JanuslensError):
    """The timeout passed; the server has stopped computing."""


class Cancelled(JanuslensError):
    """The call was cancelled."""


class Aborted(JanuslensError):
    """The server aborted the call."""


class ReaderStalled(Aborted):
    """The stream was not read for longer than the server waits."""


class RequestStalled(Aborted):
    """The request did not reach the server in time."""


class Unauthenticated(JanuslensError):
    """The token is missing, unknown or expired."""


class PermissionDenied(JanuslensError):
    """The token is valid but does not allow this call or this model."""


class Unimplemented(JanuslensError):
    """The server does not offer this call."""


class InternalError(JanuslensError):
    """A bug in the server; its log has an entry for the `request_id`."""


class StreamInterrupted(JanuslensError):
    """The stream ended before its summary; `partial` is incomplete, or None before the header.

    The server or the connection to it was lost. The request itself is fine: a client with
    `resume=True` requests the rest from another replica.
    """


class TraceInterrupted(StreamInterrupted):
    """A trace was interrupted; `partial` is a `Trace` of the layers received."""


class GradientInterrupted(StreamInterrupted):
    """A gradient lens was interrupted; `partial` is a `Gradient` of the matrices received."""


class ActivationsInterrupted(StreamInterrupted):
    """A stream of activations was interrupted; `partial` has the whole tensors received."""


class InterveneInterrupted(StreamInterrupted):
    """A stream of effects was interrupted; `partial` has the effects received."""


class GenerationInterrupted(StreamInterrupted):
    """A generation was interrupted; `partial` has the tokens received."""


class ProtocolViolation(JanuslensError):
    """The stream breaks the contract, e.g. a message is missing."""


# The exception type for each `reason` that the server sends. Two reasons are the client's own.
BY_REASON: Mapping[str, type[JanuslensError]] = {
    "INVALID_REQUEST": InvalidRequest,
    "MODEL_NOT_FOUND": ModelNotFound,
    "REVISION_NOT_FOUND": RevisionNotFound,
    "MODEL_EXISTS": ModelExists,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
    "MODEL_FAILED": ModelFailed,
    "NO_CHAT_TEMPLATE": NoChatTemplate,
    "MODEL_LOADING": ModelLoading,
    "SERVER_DRAINING": ServerDraining,
    "LIMIT_EXCEEDED": LimitExceeded,
    "QUEUE_FULL": QueueFull,
    "QUOTA_SPENT": QuotaSpent,
    "OUT_OF_MEMORY": OutOfMemory,
    "DEVICE_LOST": DeviceLost,
    "NOT_FINITE": NotFinite,
    "DEADLINE_PASSED": DeadlineExceeded,
    "REQUEST_CANCELLED": Cancelled,
    "READER_STALLED": ReaderStalled,
    "REQUEST_STALLED": RequestStalled,
    "INTERNAL": InternalError,
    "STREAM_INTERRUPTED": StreamInterrupted,
    "PROTOCOL_VIOLATION": ProtocolViolation,
}

# For statuses without a reason that this client knows: gRPC's own, a proxy's, a newer server's.
BY_STATUS: Mapping[str, type[JanuslensError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "OUT_OF_RANGE": InvalidRequest,
    "NOT_FOUND": NotFound,
    "ALREADY_EXISTS": ModelExists,
    "FAILED_PRECONDITION": FailedPrecondition,
    "UNAVAILABLE": Unavailable,
    "RESOURCE_EXHAUSTED": ResourceExhausted,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": Cancelled,
    "ABORTED": Aborted,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
    "UNIMPLEMENTED": Unimplemented,
}


class LaunchError(RuntimeError):
    """The server that `januslens.launch` started ended, or its models did not load."""
