"""What every server of ours tells gRPC's core."""

from __future__ import annotations

Options = list[tuple[str, int]]


def server_options(*, share_port: bool = False) -> Options:
    """`share_port` lets processes of this user that ask for it listen on the same one.

    Without that a second server on the port would silently share its calls.
    """
    return [
        ("grpc.so_reuseport", int(share_port)),
        # Idle connections survive clients' pings every 10 s; core's constant has RECV in its name,
        # its key has not.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
