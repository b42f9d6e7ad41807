"""Channel options of our gRPC servers."""

from __future__ import annotations

Options = list[tuple[str, int]]


def server_options(*, share_port: bool = False) -> Options:
    """Options for every server; `share_port` lets several processes listen on one port.

    gRPC shares ports by default, so a second server would silently receive some of the calls.
    """
    return [
        ("grpc.so_reuseport", int(share_port)),
        # Allow clients to ping idle connections every 10 s. (The C constant for this key has RECV
        # in its name.)
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
