"""Options of gRPC's core for every server, and the limits on what its peers may hold."""

from __future__ import annotations

from dataclasses import dataclass

Options = list[tuple[str, int]]

# A peer that says nothing for this long after it has connected is dropped.
HANDSHAKE_SECONDS = 20
# A connection without calls is closed after this time; clients connect again when they need to.
IDLE_SECONDS = 600
# After a minute of silence the server pings; a peer that does not answer is gone.
PING_AFTER_SECONDS, PING_ANSWER_SECONDS = 60, 20


@dataclass(frozen=True)
class PeerLimits:
    """Limits of one server: open `connections`, and open calls (`streams`) of each.

    A connection beyond the limit is closed at once; clients delay calls beyond theirs.
    """

    connections: int = 1000
    streams: int = 256


def server_options(limits: PeerLimits | None = None, *, share_port: bool = False) -> Options:
    """The options of one server.

    `share_port` lets processes of this user that ask for it listen on the same port. Without it, a
    second server on the port would silently share its calls.
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
        # Idle connections survive clients' pings every 10 s. The name of core's constant contains
        # RECV, this key does not.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Core would enlarge the windows of fast peers, and hold that much of a request before
        # anything asks for it.
        ("grpc.http2.bdp_probe", 0),
    ]
