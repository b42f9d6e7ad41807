"""Errors of requests. `rpc.status` maps each class to a gRPC status.

The class tree::

    IntrospectionError
    |-- InvalidRequest          the request must be changed
    |-- LimitExceeded           the estimated cost is above limits, or preparation takes too long
    |-- ModelNotFound           no model of this name
    |   `-- RevisionNotFound    the model has another revision
    |-- ModelExists             another model has this name
    |-- Unauthenticated         no valid token
    |-- PermissionDenied        outside the caller's scope
    |-- ModelFailed             the model did not load or failed its self-check
    |-- NoChatTemplate          the tokenizer has no usable chat template
    |-- TryLater                the request may be repeated unchanged
    |   |-- ModelLoading
    |   |-- ServerDraining
    |   |-- QueueFull
    |   |-- QuotaSpent
    |   |-- OutOfMemory
    |   `-- DeviceLost          until the server is restarted
    |-- NotFinite               the model overflows on this prompt
    |-- DeadlinePassed
    |-- RequestCancelled
    `-- ReaderStalled
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import ParamSpec, Self, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")

# A function that raises `RequestCancelled` or `DeadlinePassed` if the running request should stop.
# Long computations have it as an argument and call it often.
CancelCheck = Callable[[], None]


def never_cancelled() -> None:
    """A `CancelCheck` that never raises."""


class IntrospectionError(Exception):
    """Base class; its text is shown to the caller, and `reason` is stable across releases."""

    reason = "INTROSPECTION_ERROR"


def readable_size(count: float) -> str:
    """Format a number of bytes in powers of 1024: `512 B`, `20.1 KiB`, `1.50 GiB`."""
    for unit, power, digits in (("GiB", 30, 2), ("MiB", 20, 1), ("KiB", 10, 1)):
        if count >= 2**power:
            return f"{count / 2**power:.{digits}f} {unit}"
    return f"{count:.0f} B"


def shortlist(names: Sequence[str], shown: int = 3) -> str:
    """Join the first names, and count the others: `a, b, c and 2 more`."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


@dataclass(frozen=True)
class FieldViolation:
    """An invalid field of a request."""

    field: str
    description: str


class InvalidRequest(IntrospectionError):
    """The request is invalid for this model and must be changed."""

    reason = "INVALID_REQUEST"

    def __init__(self, field: str, description: str) -> None:
        """`description` says what is wrong with the request field with the path `field`."""
        self._set((FieldViolation(field, description),))

    @classmethod
    def joined(cls, errors: Sequence[InvalidRequest]) -> InvalidRequest:
        """Return one error with the violations of all of these."""
        found = cls("", "")
        found._set(tuple(dict.fromkeys(v for error in errors for v in error.violations)))
        return found

    def _set(self, violations: Sequence[FieldViolation]) -> None:
        self.args = ("; ".join(f"{v.field}: {v.description}" for v in violations),)
        self.violations = tuple(violations)


class IndependentFields:
    """Reads fields that do not depend on each other, and reports all invalid ones together.

    As a context manager, it raises one `InvalidRequest` at the end if any field was invalid. Values
    that were read must not be used before.
    """

    def __init__(self) -> None:
        self._errors: list[InvalidRequest] = []

    def __enter__(self) -> Self:
        return self

    def read(self, read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `read`; if it raises `InvalidRequest`, keep the error for later."""
        try:
            return read(*args, **kwargs)
        except InvalidRequest as error:
            self._errors.append(error)
            return cast("T", None)

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if error is None and self._errors:
            raise InvalidRequest.joined(self._errors)


class CostLimit(Enum):
    """A limit on the cost of a request, by the name of its setting if it has one."""

    MAX_REQUEST_SECONDS = "max_request_seconds"
    MAX_REQUEST_MEMORY = "max_request_memory"
    FREE_MEMORY = "free_memory"
    MAX_REQUEST_STREAM = "max_request_stream"
    PREPARATION_SECONDS = "preparation_seconds"


@dataclass(frozen=True)
class LimitViolation:
    """A limit that a request exceeds, with both figures in seconds or bytes.

    `description` states them for people.
    """

    limit: CostLimit
    allowed: float
    estimated: float
    description: str


class LimitExceeded(IntrospectionError):
    """The estimated cost of the request is above limits; the text has the figures of each."""

    reason = "LIMIT_EXCEEDED"

    def __init__(self, violations: Sequence[LimitViolation], advice: str = "") -> None:
        """`violations` are all limits that are exceeded; `advice` says what to do."""
        described = " and ".join(violation.description for violation in violations)
        advice = advice or "request fewer layers, positions, parts or components"
        super().__init__(f"request too large: {described}; {advice}")
        self.violations = tuple(violations)


class ModelNotFound(IntrospectionError):
    """No model of the server has this name."""

    reason = "MODEL_NOT_FOUND"


class RevisionNotFound(ModelNotFound):
    """The model has another revision than the request requires."""

    reason = "REVISION_NOT_FOUND"


class ModelExists(IntrospectionError):
    """The name of a model to load belongs to another model, or to one that is being unloaded."""

    reason = "MODEL_EXISTS"


class Unauthenticated(IntrospectionError):
    """The request has no valid token."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(IntrospectionError):
    """This RPC or model is outside the caller's scope."""

    reason = "PERMISSION_DENIED"


class ModelFailed(IntrospectionError):
    """The model did not load or failed its self-check."""

    reason = "MODEL_FAILED"


class WrongResults(ModelFailed):
    """The installed libraries compute wrong results for this model."""


class NoChatTemplate(IntrospectionError):
    """The model's tokenizer has no chat template, or one that the server cannot render."""

    reason = "NO_CHAT_TEMPLATE"


class TryLater(IntrospectionError):
    """The request may be repeated unchanged after `retry_after` seconds."""

    reason = "TRY_LATER"

    def __init__(self, text: str, retry_after: float = 1.0) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class ModelLoading(TryLater):
    """The model is still loading."""

    reason = "MODEL_LOADING"


class ServerDraining(TryLater):
    """The server is shutting down and accepts no new requests."""

    reason = "SERVER_DRAINING"

    def __init__(self, text: str, retry_after: float = 0.1) -> None:
        super().__init__(text, retry_after)  # short: another replica may be available now


class QueueFull(TryLater):
    """The queue for the device is full."""

    reason = "QUEUE_FULL"


class QuotaSpent(TryLater):
    """The caller has used up a quota."""

    reason = "QUOTA_SPENT"

    def __init__(self, caller: str, quota: str, retry_after: float) -> None:
        """`quota` names the limit, such as `120 requests a minute`."""
        text = f"quota of caller {caller!r} used up: {quota}; try again in {retry_after:.3g} s"
        super().__init__(text, retry_after)
        self.caller = caller
        self.quota = quota


class OutOfMemory(TryLater):
    """The device ran out of memory during this request."""

    reason = "OUT_OF_MEMORY"


class DeviceLost(TryLater):
    """The device has failed; another replica may serve the request."""

    reason = "DEVICE_LOST"

    def __init__(self) -> None:
        super().__init__("the server's device has failed; use another replica", retry_after=10.0)


class NotFinite(IntrospectionError):
    """The model's activations or logits for this prompt are infinite or NaN."""

    reason = "NOT_FINITE"

    def __init__(self, problem: str, advice: str = "", model_advice: str = "") -> None:
        """`advice` is how to change the request, `model_advice` how to serve the model."""
        alternatives = ", or ".join(filter(None, [advice, model_advice]))
        super().__init__(f"{problem}; {alternatives}" if alternatives else problem)
        self.problem, self.model_advice = problem, model_advice


class DeadlinePassed(IntrospectionError):
    """The caller's deadline passed before the request finished."""

    reason = "DEADLINE_PASSED"


class RequestCancelled(IntrospectionError):
    """The caller cancelled the request or disconnected."""

    reason = "REQUEST_CANCELLED"


class ReaderStalled(IntrospectionError):
    """The caller did not read its stream in time."""

    reason = "READER_STALLED"


class RequestStalled(IntrospectionError):
    """The caller did not send the whole request in time."""

    reason = "REQUEST_STALLED"
