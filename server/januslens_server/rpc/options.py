"""What every server of ours tells gRPC's core."""

OPTIONS = (
    # Without this a second server on the same port would silently share its calls.
    ("grpc.so_reuseport", 0),
    # Idle connections survive clients' pings every 10 s; core's constant has RECV in its name, its
    # key has not.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)
