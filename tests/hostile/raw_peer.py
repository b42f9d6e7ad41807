"""An HTTP/2 peer that can send what no gRPC library would, to attack a server under test."""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from collections import defaultdict
from types import TracebackType
from typing import Self

from google.protobuf.message import Message
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.settings import SettingCodes, Settings

HEALTH = "/grpc.health.v1.Health/"
# gRPC's frame of a message: a flag (not compressed), then the length.
PREFIX = struct.Struct(">BI")


def framed(message: bytes) -> bytes:
    """Return a message in gRPC's framing."""
    return PREFIX.pack(0, len(message)) + message


class RawPeer:
    """One connection, whose streams and windows the test controls.

    Data is acknowledged only with `reads`; `window` is the size of each stream's receive window.
    """

    def __init__(
        self,
        address: str,
        *,
        window: int = 65_535,
        reads: bool = True,
        source: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Connect from `source`, any address of the loopback network, over TLS if given."""
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), 10, (source, 0))
        if tls is not None:
            self._socket = tls.wrap_socket(self._socket, server_hostname=host)
        self._reads = reads
        config = H2Configuration(client_side=True, header_encoding="utf-8")
        self.http2 = H2Connection(config)
        self.http2.local_settings = Settings(
            client=True, initial_values={SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        self.http2.initiate_connection()
        self.received: dict[int, bytes] = defaultdict(bytes)
        self.trailers: dict[int, dict[str, str]] = {}
        self.reset: set[int] = set()
        self.closed = False
        self.flush()
        self.pump(0.2)  # the server's settings

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None
    ) -> None:
        self._socket.close()

    def headers(
        self, method: str, *more: tuple[str, str], end: bool = False, token: str | None = None
    ) -> int:
        """Open a stream for an RPC; return its number."""
        stream: int = self.http2.get_next_available_stream_id()
        fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ]
        if token is not None:
            fields.append(("authorization", f"Bearer {token}"))
        self.http2.send_headers(stream, [*fields, *more], end_stream=end)
        return stream

    def call(self, method: str, request: Message, token: str | None = None) -> int:
        """Start an RPC with its whole request of any size; return its stream."""
        stream = self.headers(method, token=token)
        self.send(stream, framed(request.SerializeToString()), end=True)
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = False, seconds: float = 10) -> None:
        """Send data as fast as the server accepts it."""
        deadline = time.monotonic() + seconds
        while data:
            room = min(
                self.http2.local_flow_control_window(stream), self.http2.max_outbound_frame_size
            )
            if room == 0:
                if time.monotonic() > deadline or self.closed:
                    raise TimeoutError(f"the server takes no more of stream {stream}")
                self.pump(0.05)
                continue
            part, data = data[:room], data[room:]
            self.http2.send_data(stream, part, end_stream=end and not data)
            self.flush()
        self.flush()

    def flush(self) -> None:
        """Send what has been prepared."""
        self.raw(self.http2.data_to_send())

    def raw(self, data: bytes) -> None:
        """Send any bytes; does nothing if the server has closed the connection."""
        try:
            self._socket.sendall(data)
        except OSError:
            self.closed = True

    def pump(self, seconds: float) -> None:
        """Receive from the server for this long."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and not self.closed:
            if self._decrypted() or select.select([self._socket], [], [], left)[0]:
                self._take()

    def _decrypted(self) -> bool:
        """Whether TLS holds data that the operating system no longer reports."""
        return isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0

    def wait(self, stream: int, size: int = 1, seconds: float = 5) -> bytes:
        """Return what the stream has received, once that is `size` bytes; less on a timeout."""
        deadline = time.monotonic() + seconds
        while len(self.received[stream]) < size and time.monotonic() < deadline:
            if self.closed or stream in self.trailers:
                break
            self.pump(0.02)
        return self.received[stream]

    def ended(self, stream: int, seconds: float = 5) -> dict[str, str] | None:
        """Return the stream's trailers; None if it is still open, or was reset."""
        deadline = time.monotonic() + seconds
        while stream not in self.trailers | dict.fromkeys(self.reset):
            if self.closed or time.monotonic() > deadline:
                break
            self.pump(0.02)
        return self.trailers.get(stream)

    def _take(self) -> None:
        try:
            data = self._socket.recv(2**18)
        except OSError:
            data = b""
        if not data:
            self.closed = True
            return
        for event in self.http2.receive_data(data):
            self._note(event)
        self.flush()

    def _note(self, event: Event) -> None:
        match event:
            case DataReceived():
                self.received[event.stream_id] += event.data
                if self._reads and event.flow_controlled_length:
                    size, stream = event.flow_controlled_length, event.stream_id
                    self.http2.acknowledge_received_data(size, stream)
            case ResponseReceived() | TrailersReceived():
                fields = {str(key): str(value) for key, value in event.headers or ()}
                if "grpc-status" in fields:
                    self.trailers[event.stream_id] = fields
            case StreamReset():
                self.reset.add(event.stream_id)
            case StreamEnded():
                self.trailers.setdefault(event.stream_id, {})
            case ConnectionTerminated():
                self.closed = True
