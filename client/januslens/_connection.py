"""Connections of both clients: address, credentials, timeouts, and errors of failed calls."""

from __future__ import annotations

import ipaddress
import json
import math
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote

import grpc
import numpy as np
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from januslens import errors
from januslens.errors import JanuslensError, StreamInterrupted

DEFAULT_ADDRESS = "127.0.0.1:50051"

# gRPC's servers end connections that ping more often than every five minutes without sending.
_KEEPALIVE_MS = 360_000

# Calls go round the addresses that a name stands for. One that no server has begun to serve is
# repeated, after the pause that the server asked for or else a growing one; with a server's first
# headers gRPC takes it for begun and repeats it no more.
SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": "januslens.v1.IntrospectionService"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}

_CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    # A connection stays with one process of a server: each client has one of its own.
    ("grpc.use_local_subchannel_pool", 1),
    # gRPC would look for a lost server less and less often, after a while every two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 20_000),
)

ResponseHook = Callable[[Message], object]


@dataclass(frozen=True)
class Connection:
    """Where to, with what, for how long.

    Attributes:
        address: `host:port`, or any name that gRPC resolves.
        token: Sent as `authorization: Bearer ...`; None = none.
        timeout: Seconds for calls that don't say; None = no limit.
        credentials: Of an encrypted channel; None = plain text.
        resume: Ask another replica for what a lost one had begun and not finished.
        on_response: Sees every response message before it is read.
    """

    address: str
    token: str | None = field(repr=False)
    timeout: float | None
    credentials: grpc.ChannelCredentials | None
    resume: bool
    on_response: ResponseHook | None

    def seconds(self, timeout: float | None) -> float | None:
        """The call's own timeout in seconds, else the client's; None = no limit.

        Raises:
            TypeError: The timeout is not a number.
            ValueError: The timeout is negative or NaN.
        """
        return checked_timeout(self.timeout if timeout is None else timeout)

    @property
    def channel_options(self) -> Sequence[tuple[str, int | str]]:
        """The channel's options. A loopback address is never reached through an HTTP proxy.

        gRPC sends calls to the proxy that `http_proxy` and similar variables name, unless
        `no_proxy` lists the host. No proxy can reach this machine's loopback, and the call
        carries the token.
        """
        if is_loopback(self.address):
            return (*_CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0))
        return _CHANNEL_OPTIONS

    def seen(self, response: Message) -> None:
        """Show a response to whoever asked to see them."""
        if self.on_response is not None:
            self.on_response(response)


@dataclass(frozen=True)
class Attempt:
    """One call, to be found by its id here and in the server's log."""

    connection: Connection
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with the request."""
        entries = (("x-request-id", self.request_id),)
        if self.connection.token is None:
            return entries
        return (*entries, ("authorization", f"Bearer {self.connection.token}"))

    def failure(
        self,
        call: FailedCall,
        partial: object = None,
        interrupted: type[StreamInterrupted] | None = None,
    ) -> JanuslensError:
        """The exception for this call's failure; `partial` is the received part of a stream."""
        address = self.connection.address
        return exception_from(call, self.request_id, address, partial, interrupted)


def channel_credentials(
    *,
    secure: bool,
    root_certificates: str | Path | None,
    client_certificate: tuple[str | Path, str | Path] | None,
    credentials: grpc.ChannelCredentials | None,
) -> grpc.ChannelCredentials | None:
    """How to encrypt; None = not at all.

    Raises:
        ValueError: Both credentials and files to make them of.
        OSError: A file cannot be read.
    """
    files = root_certificates is not None or client_certificate is not None
    if credentials is not None:
        if files:
            raise ValueError("expected credentials or certificate files; got both")
        return credentials
    if not (secure or files):
        return None
    roots = None if root_certificates is None else Path(root_certificates).read_bytes()
    chain, key = client_certificate or (None, None)
    return grpc.ssl_channel_credentials(
        roots,
        None if key is None else Path(key).read_bytes(),
        None if chain is None else Path(chain).read_bytes(),
    )


# gRPC overflows with timeouts of centuries; some thirty years are as good as none.
_LONGEST_TIMEOUT = 1e9


def checked_timeout(timeout: Any) -> float | None:
    """A timeout in seconds, None for no limit: infinity and anything above thirty years.

    Raises:
        TypeError: The timeout is not a number.
        ValueError: The timeout is negative or NaN.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float, np.integer, np.floating)):
        raise TypeError(f"timeout must be a number of seconds or None, got {timeout!r}")
    if math.isnan(timeout) or timeout < 0:
        raise ValueError(f"timeout must be 0 or more seconds, or None for no limit; got {timeout}")
    return float(timeout) if timeout < _LONGEST_TIMEOUT else None


def is_loopback(address: str) -> bool:
    """Whether every host of a gRPC address, e.g. `dns:///localhost:50051`, is this machine."""
    scheme, separator, rest = address.partition(":")
    listed = separator and scheme in {"dns", "ipv4", "ipv6", "passthrough"}
    targets = unquote(rest if listed else address).rpartition("/")[2].split(",")
    return all(_is_loopback_host(_host(target)) for target in targets)


def _host(target: str) -> str:
    """`host` of `host:port`, `[host]:port` or `host`."""
    if target.startswith("["):
        return target[1:].partition("]")[0]
    return target.partition(":")[0] if target.count(":") == 1 else target


def _is_loopback_host(host: str) -> bool:
    name = host.lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        parsed = ipaddress.ip_address(name)
    except ValueError:  # a name
        return False
    return parsed.is_loopback or parsed.is_unspecified


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
