"""Options of gRPC's core, and limits on connections and calls."""

from __future__ import annotations

from dataclasses import dataclass

Options = list[tuple[str, int]]

# A peer that sends nothing for this long after connecting is disconnected.
HANDSHAKE_SECONDS = 20
# A connection without calls is closed after this time; clients connect again when they need to.
IDLE_SECONDS = 600
# The server sends a ping after a minute without data; a peer that does not reply is disconnected.
PING_AFTER_SECONDS, PING_ANSWER_SECONDS = 60, 20


@dataclass(frozen=True)
class PeerLimits:
    """Maximum number of open `connections`, and of open calls (`streams`) of each.

    A connection above the limit is closed at once. Clients delay calls above the limit.
    """

    connections: int = 1000
    streams: int = 256


def server_options(limits: PeerLimits | None = None, *, share_port: bool = False) -> Options:
    """Return the options of one server.

    With `share_port`, processes of this user can listen on the same port. Otherwise it is disabled,
    because a second server could take over some of the calls unnoticed.
    """
    limits = limits or PeerLimits()
    return [
        ("grpc.so_reuseport", int(share_port)),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.max_concurrent_streams", limits.streams),
        ("grpc.server_handshake_timeout_ms", 1000 * HANDSHAKE_SECONDS),
        ("grpc.max_connection_idle_ms", 1000 * IDLE_SECONDS),
        ("grpc.keepalive_time_ms", 1000 * PING_AFTER_SECONDS),
        ("grpc.keepalive_timeout_ms", 1000 * PING_ANSWER_SECONDS),
        # Allows clients to send a ping every 10 s on idle connections. The name of core's constant
        # contains RECV, but this key does not.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Otherwise core enlarges the windows of fast peers, and stores that much of a request
        # before the server reads it.
        ("grpc.http2.bdp_probe", 0),
    ]
