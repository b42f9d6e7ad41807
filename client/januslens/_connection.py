"""What both clients need to make a call: where to, with what, for how long."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
from google.protobuf.message import Message

from januslens._errors import JanuslensError
from januslens._status import FailedCall, exception_from

DEFAULT_ADDRESS = "127.0.0.1:50051"

# gRPC's servers end connections that ping more often than every five minutes without sending.
_KEEPALIVE_MS = 360_000
CHANNEL_OPTIONS = (
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
        on_response: Sees every response message before it is read.
    """

    address: str
    token: str | None = field(repr=False)
    timeout: float | None
    credentials: grpc.ChannelCredentials | None
    on_response: ResponseHook | None

    def deadline(self, timeout: float | None) -> float | None:
        """The call's own timeout, or the client's."""
        return self.timeout if timeout is None else timeout

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

    def failure(self, call: FailedCall, partial: object = None) -> JanuslensError:
        """The exception for this call's failure; `partial` is what a stream had brought."""
        return exception_from(call, self.request_id, self.connection.address, partial)


def connection(
    address: str,
    *,
    token: str | None,
    timeout: float | None,
    secure: bool,
    credentials: grpc.ChannelCredentials | None,
    on_response: ResponseHook | None,
) -> Connection:
    """A client's arguments; `secure` without `credentials` means the system's certificates."""
    if secure and credentials is None:
        credentials = grpc.ssl_channel_credentials()
    return Connection(address, token, timeout, credentials, on_response)
