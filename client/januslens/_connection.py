"""The settings of a connection, and the exceptions for failed calls, of both clients."""

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
from januslens.arguments import checked_text
from januslens.errors import JanuslensError, StreamInterrupted
from januslens.results.models import Waiting
from januslens.v1 import cost_pb2, streams_pb2

DEFAULT_ADDRESS = "127.0.0.1:50051"

# A call may wait for minutes without data. Load balancers end such connections, some after 240 s.
# The server accepts pings every ten seconds.
_KEEPALIVE_MS = 120_000

# If the name has several addresses, gRPC uses them in turn. It retries a call until it receives
# headers, which the server sends when it admits the request. It waits as long as the server asked
# for, or else longer each time.
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
    # Give each client a connection of its own; a connection stays with one process of the server.
    ("grpc.use_local_subchannel_pool", 1),
    # By default gRPC tries to reconnect less and less often, in the end every two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 20_000),
)

# What gRPC accepts in metadata.
_PRINTABLE = re.compile(r"[ -~]*")
_KEY = re.compile(r"[a-z0-9_.-]+")
_REQUEST_ID = "x-request-id"

# Pairs of gRPC metadata: text values, and bytes for keys that end with `-bin`.
Metadata = Sequence[tuple[str, str | bytes]]

ResponseHook = Callable[[Message], object]
WaitingHook = Callable[[Waiting], object]

# Asks for messages while a request waits for the device.
REPORT_WAITING = ("x-report-waiting", "true")


@dataclass(frozen=True)
class Connection:
    """The settings of a client's connection.

    Attributes:
        address: `host:port`, or any name that gRPC can resolve.
        token: Bearer token, sent in the `authorization` metadata; None = no token.
        timeout: Maximum seconds for calls without a timeout; None = no limit.
        credentials: The channel credentials for TLS; None = no encryption.
        resume: Resume interrupted calls on another replica.
        on_response: Called with every response message on arrival.
        metadata: Sent with every call, besides the request id and the token.
        interceptors: gRPC client interceptors of the channel, the outermost first.
        on_waiting: Called with the place of a request that waits for the device.
    """

    address: str
    token: str | None = field(repr=False)
    timeout: float | None
    credentials: grpc.ChannelCredentials | None
    resume: bool
    on_response: ResponseHook | None
    metadata: Metadata = field(default=(), repr=False)
    interceptors: Sequence[Any] = ()
    on_waiting: WaitingHook | None = None

    def __post_init__(self) -> None:
        """Check what cannot be sent.

        Raises:
            TypeError: The address or token is not text, or the timeout is not a number.
            ValueError: The address is a URL or has an invalid port, the token or metadata holds
                invalid characters, or the timeout is negative.
        """
        _check_address(self.address)
        checked_timeout(self.timeout)
        for key, value in self.metadata:
            _check_metadata(key, value)
        if self.token is not None and not _PRINTABLE.fullmatch(checked_text(self.token, "token")):
            raise ValueError("invalid token; expected printable ASCII characters")

    def seconds(self, timeout: float | None) -> float | None:
        """The call's own timeout in seconds, else the client's; None = no limit.

        Raises:
            TypeError: The timeout is not a number.
            ValueError: The timeout is negative or NaN.
        """
        return checked_timeout(self.timeout if timeout is None else timeout)

    @property
    def channel_options(self) -> Sequence[tuple[str, int | str]]:
        """The options of the gRPC channel, which disable HTTP proxies for loopback addresses.

        gRPC sends calls to the proxy that `http_proxy` and similar variables name, unless
        `no_proxy` lists the host. A proxy cannot reach the loopback interface of this machine,
        but would receive the token.
        """
        if is_loopback(self.address):
            return (*_CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0))
        return _CHANNEL_OPTIONS

    def seen(self, response: Message) -> None:
        """Pass a response to `on_response`, if it is set."""
        if self.on_response is not None:
            self.on_response(response)

    def waits(self, waiting: streams_pb2.Waiting) -> None:
        """Pass the place of a waiting request to `on_waiting`, if it is set."""
        if self.on_waiting is not None:
            self.on_waiting(Waiting.from_message(waiting))


@dataclass(frozen=True)
class Attempt:
    """One attempt of a call, identified by its request id here and in the server's log."""

    connection: Connection
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def metadata(self) -> Metadata:
        """The metadata of the request: its id, the token if there is one, and the client's own."""
        entries: Metadata = ((_REQUEST_ID, self.request_id), *self.connection.metadata)
        if self.connection.on_waiting is not None:
            entries = (*entries, REPORT_WAITING)
        if self.connection.token is None:
            return entries
        return (*entries, ("authorization", f"Bearer {self.connection.token}"))

    def failure(
        self,
        call: FailedCall,
        partial: object = None,
        interrupted: type[StreamInterrupted] | None = None,
    ) -> JanuslensError:
        """Return the exception for a failed call; `partial` is the received part of a stream."""
        address = self.connection.address
        return exception_from(call, self.request_id, address, partial, interrupted)


# Schemes of gRPC's own names, such as `dns:///janus:50051` and `xds:///janus`.
_NAME_SCHEMES = {"dns", "google-c2p", "ipv4", "ipv6", "passthrough", "unix", "unix-abstract", "xds"}
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://([^/]*)", re.IGNORECASE)
_LAST_PORT = 65_535


def _check_address(address: str) -> None:
    """Raise if an address is a URL, or if its port does not exist.

    gRPC would look up the whole URL as a host name, and use a port modulo 65536.
    """
    url = _URL.match(checked_text(address, "address"))
    if url is not None and (scheme := url[1].lower()) not in _NAME_SCHEMES:
        tls = " with secure=True (--secure)" if scheme in {"https", "grpcs"} else ""
        raise ValueError(
            f"invalid address {address!r}; the client speaks gRPC and expects host:port, not a "
            f"URL; give {_with_port(url[2])!r}{tls}"
        )
    for target in _targets(address):
        port = _port(target)
        if port.isdecimal() and int(port) > _LAST_PORT:
            raise ValueError(
                f"invalid address {address!r}; expected a port of at most {_LAST_PORT}"
            )


def _with_port(target: str) -> str:
    """Return an address with the default port of a server if it has no port."""
    return target if _port(target) else target + DEFAULT_ADDRESS[DEFAULT_ADDRESS.rindex(":") :]


def _check_metadata(key: str, value: str | bytes) -> None:
    """Raise if gRPC does not accept a pair of metadata, or if this client sets it itself."""
    if not _KEY.fullmatch(checked_text(key, "metadata key")):
        raise ValueError(f"invalid metadata key {key!r}; expected a-z, 0-9, _, . and -")
    if key == _REQUEST_ID or key.startswith("grpc-"):
        raise ValueError(f"metadata key {key!r} is set by the client; use another key")
    if key.endswith("-bin"):
        if not isinstance(value, bytes):
            raise TypeError(f"invalid metadata value of {key!r}; expected bytes")
    elif not _PRINTABLE.fullmatch(checked_text(value, f"metadata value of {key!r}")):
        raise ValueError(
            f"invalid metadata value of {key!r}; expected printable ASCII characters; send bytes "
            "with a key that ends with '-bin'"
        )


def channel_credentials(
    *,
    secure: bool,
    root_certificates: str | Path | None,
    client_certificate: tuple[str | Path, str | Path] | None,
    credentials: grpc.ChannelCredentials | None,
) -> grpc.ChannelCredentials | None:
    """Return the channel credentials for these arguments; None = no encryption.

    Raises:
        ValueError: Both credentials and certificate files were given.
        OSError: A file cannot be read.
    """
    files = root_certificates is not None or client_certificate is not None
    if credentials is not None:
        if files:
            raise ValueError("credentials and certificate files are both given; give one")
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


# Seconds, about 30 years. gRPC overflows with timeouts of centuries.
_LONGEST_TIMEOUT = 1e9


def checked_timeout(timeout: Any) -> float | None:
    """Return the timeout in seconds. None means no limit, as does a timeout above thirty years.

    Raises:
        TypeError: The timeout is not a number.
        ValueError: The timeout is negative or NaN.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float, np.integer, np.floating)):
        raise TypeError(f"invalid timeout {timeout!r}; expected a number of seconds, or None")
    if math.isnan(timeout) or timeout < 0:
        raise ValueError(f"invalid timeout {timeout}; expected 0 or more seconds, or None")
    return float(timeout) if timeout < _LONGEST_TIMEOUT else None


# Shortest and longest seconds between two questions whether a model is loaded.
_SHORTEST_POLL, _LONGEST_POLL = 0.2, 5.0


def poll_seconds(waited: float) -> float:
    """Return how long to wait before asking again whether a model is loaded.

    It is a tenth of the seconds `waited` so far: the server logs a line for every question, and
    large models load for many minutes.
    """
    return min(_LONGEST_POLL, max(_SHORTEST_POLL, waited / 10))


def is_loopback(address: str) -> bool:
    """Whether all hosts of a gRPC address, such as `dns:///localhost:50051`, are loopback."""
    return all(_is_loopback_host(_host(target)) for target in _targets(address))


def _targets(address: str) -> Sequence[str]:
    """Return the `host:port` pairs of a gRPC address; none for a socket in the file system."""
    scheme, separator, rest = address.partition(":")
    if separator and scheme in {"unix", "unix-abstract"}:
        return ()
    listed = separator and scheme in {"dns", "ipv4", "ipv6", "passthrough"}
    return unquote(rest if listed else address).rpartition("/")[2].split(",")


def _host(target: str) -> str:
    """Return the host of an address `host:port`, `[host]:port` or `host`."""
    if target.startswith("["):
        return target[1:].partition("]")[0]
    return target.partition(":")[0] if target.count(":") == 1 else target


def _port(target: str) -> str:
    """Return the port of an address `host:port`, `[host]:port` or `host`; empty = none."""
    if target.startswith("["):
        return target.rpartition("]")[2].removeprefix(":")
    return target.partition(":")[2] if target.count(":") == 1 else ""


def _is_loopback_host(host: str) -> bool:
    name = host.lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        parsed = ipaddress.ip_address(name)
    except ValueError:  # a host name
        return False
    return parsed.is_loopback or parsed.is_unspecified


MessageT = TypeVar("MessageT", bound=Message)


# How gRPC describes a response that comes from an HTTP proxy.
_BAD_GATEWAY = re.compile(r"http2 header with status: 50[24]")

_LOST = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}


class FailedCall(Protocol):
    """The methods that gRPC's synchronous and asynchronous errors have in common."""

    def code(self) -> grpc.StatusCode:
        """The status code."""

    def details(self) -> str | None:
        """The message of the status."""

    def initial_metadata(self) -> Iterable[Any] | None:
        """The initial metadata as pairs, or None."""

    def trailing_metadata(self) -> Iterable[Any] | None:
        """The trailing metadata as pairs, or None."""


def was_cut(call: FailedCall) -> bool:
    """Whether the connection broke after the server had begun to serve the call.

    Errors of the server carry details. Errors of proxies and of gRPC about a broken connection do
    not. The server has begun when it has sent headers; until then gRPC retries the call. A proxy
    that loses its connection to the server answers 502 or 504 with headers of its own, which gRPC
    treats like the server's. Such calls count as begun, because the server may have begun to serve
    them.
    """
    if not _broken(call):
        return False
    begun = any(key == _REQUEST_ID for key, _ in call.initial_metadata() or ())
    return begun or _BAD_GATEWAY.search(call.details() or "") is not None


def _broken(call: FailedCall) -> bool:
    if _packed_details(call):
        return False
    # A proxy cancelled the call, not the client.
    reset = call.code() is grpc.StatusCode.CANCELLED and "RST_STREAM" in (call.details() or "")
    return reset or call.code() in _LOST


def exception_from(
    call: FailedCall,
    request_id: str,
    address: str,
    partial: object = None,
    interrupted: type[errors.StreamInterrupted] | None = None,
) -> errors.JanuslensError:
    """Return the typed exception for a failed call, with all details that the server sent.

    If the connection broke, and the server had begun to serve the stream or a part of it has
    arrived, the exception has the type `interrupted`.
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
        return f"no answer from {address}: {text}{_advice(text, address)}"
    if call.code() is grpc.StatusCode.UNAUTHENTICATED and text.startswith("missing bearer token"):
        return f"{text}; in Python, set token="
    return text


# What gRPC reports of a connection that fails, and its probable cause. The first match counts.
_CAUSES = {
    "WRONG_VERSION_NUMBER": "the server does not use TLS, or the port is not its gRPC port; "
    "connect without TLS, or give the gRPC port",
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not trusted; set root_certificates "
    "to the PEM file of its authority",
    "Hostname Verification": "the server's certificate is for another name; connect with a name "
    "that the certificate has",
    "Expected SETTINGS frame": "the port does not serve gRPC; give the server's gRPC port, not "
    "that of its metrics",
    "Socket closed": "the server may require TLS; set secure=True or root_certificates",
    "Connection refused": "is januslens-server running there?",
}
_NO_PORT = "the address has no port, for which gRPC uses 443; give host:port"


def _advice(text: str, address: str) -> str:
    """Explain a failed connection by its probable cause; empty if the cause is unknown."""
    advice = next((cause for sign, cause in _CAUSES.items() if sign in text), "")
    if "connections to all backends failing" not in text:
        advice = ""
    if not address.startswith(("xds:", "google-c2p:")) and not all(map(_port, _targets(address))):
        advice = _NO_PORT
    return advice and f" ({advice})"


def _error_details(call: FailedCall, request_id: str) -> errors.ErrorDetails:
    packed = _packed_details(call)
    info = _unpacked(packed, error_details_pb2.ErrorInfo)
    bad_request = _unpacked(packed, error_details_pb2.BadRequest)
    quota = _unpacked(packed, error_details_pb2.QuotaFailure)
    limits = _unpacked(packed, cost_pb2.LimitViolations)
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
        limit_violations=tuple(
            map(errors.LimitViolation.from_message, limits.violations if limits else ())
        ),
        retry_after=retry.retry_delay.ToTimedelta().total_seconds() if retry else None,
        metadata=dict(info.metadata) if info else {},
    )


def _unpacked(packed: Iterable[Any], kind: type[MessageT]) -> MessageT | None:
    """Return the detail of this type; a status has at most one of each type."""
    for detail in packed:
        message = kind()
        if detail.Unpack(message):
            return message
    return None


def _packed_details(call: FailedCall) -> Sequence[Any]:
    """Return the details of the google.rpc.Status in the trailing metadata.

    There are no details if the status cannot be read, for example because a proxy changed it.
    """
    try:
        status = rpc_status.from_call(call)
    except (DecodeError, TypeError, ValueError):
        return ()
    return () if status is None else status.details
