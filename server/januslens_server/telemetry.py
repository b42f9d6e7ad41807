"""The server's Prometheus metrics.

Label values come from settings (models, devices, names in the callers' file) or fixed sets
(methods, codes, reasons, stages), never from requests: every new value creates a series. Only the
series of a model are removed, when it is unloaded.
"""

from __future__ import annotations

import asyncio

import prometheus_client
from prometheus_client import Counter, Gauge, Histogram

# Disable `_created` series, which would double the page; Prometheus does not use them.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # as shipped

# Buckets for requests, which take from a millisecond to minutes.
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
# Buckets for parts of requests, which take from tens of microseconds.
PART_BUCKETS = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5, 30)

# These have the names and labels of go-grpc-prometheus, which existing dashboards and alerts use.
_RPC = ("grpc_type", "grpc_service", "grpc_method")
STARTED = Counter("grpc_server_started", "RPCs started.", _RPC)
HANDLED = Counter("grpc_server_handled", "RPCs completed, by status.", [*_RPC, "grpc_code"])
MESSAGES_SENT = Counter("grpc_server_msg_sent", "Messages sent to callers.", _RPC)
HANDLING_SECONDS = Histogram(
    "grpc_server_handling_seconds",
    "Seconds from start to completion of RPCs.",
    _RPC,
    buckets=REQUEST_BUCKETS,
)

REJECTED = Counter("januslens_rejected", "RPCs that ended with an error, by reason.", ["reason"])
QUEUE_DEPTH = Gauge(
    "januslens_queue_depth",
    "Requests waiting for their first turn on the device.",
    multiprocess_mode="livesum",
)
IN_FLIGHT = Gauge(
    "januslens_in_flight",
    "Requests that have started and have not ended.",
    multiprocess_mode="livesum",
)
QUEUE_SECONDS = Histogram(
    "januslens_queue_seconds",
    "Seconds from a request's admission to its first turn on the device.",
    buckets=REQUEST_BUCKETS,
)
BUSY_SECONDS = Counter("januslens_busy_seconds", "Seconds that the device thread was busy.")
STAGE_SECONDS = Histogram(
    "januslens_stage_seconds",
    "Seconds of one run of a stage; some stages run once per layer or matrix.",
    ["rpc", "stage"],
    buckets=PART_BUCKETS,
)
TOKENS = Counter("januslens_tokens", "Tokens run through forward passes.", ["model"])
VECTORS_PROJECTED = Counter("januslens_vectors_projected", "Vectors projected through the lens.")
ROW_CACHE_HITS = Counter("januslens_row_cache_hits", "Weight rows found in the row cache.")
ROW_CACHE_MISSES = Counter("januslens_row_cache_misses", "Weight rows not in the row cache.")

FIRST_MESSAGE_SECONDS = Histogram(
    "januslens_first_message_seconds",
    "Seconds from a stream's start to its first message.",
    ["grpc_method"],
    buckets=REQUEST_BUCKETS,
)
STREAM_BYTES = Counter("januslens_stream_bytes", "Bytes of messages sent.", ["grpc_method"])
WRITE_STALL_SECONDS = Histogram(
    "januslens_write_stall_seconds",
    "Seconds that a stream's message waits for its client to read.",
    buckets=PART_BUCKETS,
)

MODEL_REQUESTS = Counter(
    "januslens_model_requests",
    "RPCs completed on a model, by its level: the lowest of its layers.",
    ["grpc_method", "model", "level"],
)
EXPERIMENTS = Counter("januslens_experiments", "Experiments of Intervene requests.", ["model"])

# Callers are those of the callers' file, so an operator bounds the number of series.
_USE = ("caller", "grpc_method")
CALLER_REQUESTS = Counter(
    "januslens_caller_requests", "RPCs completed, by caller of the callers' file.", _USE
)
CALLER_DEVICE_SECONDS = Counter(
    "januslens_caller_device_seconds", "Seconds of device time, by caller.", _USE
)
CALLER_TOKENS = Counter("januslens_caller_tokens", "Tokens of prompts, by caller.", _USE)

CERTIFICATE_EXPIRY = Gauge(
    "januslens_certificate_expiry_timestamp_seconds",
    "Time at which the first certificate of a file expires, in Unix seconds.",
    ["file"],
    multiprocess_mode="livemin",
)
RELOAD_FAILED = Gauge(
    "januslens_reload_failed",
    "1 while the last reload of a file has failed.",
    ["file"],
    multiprocess_mode="livemax",
)

# With several processes, the maximum over the processes: 1 if it is 1 in any of them.
READY = Gauge(
    "januslens_ready",
    "1 while the health service januslens.ready is SERVING.",
    multiprocess_mode="livemax",
)
MODEL_STATE = Gauge(
    "januslens_model_state",
    "1 for the current state of a model.",
    ["model", "state"],
    multiprocess_mode="livemax",
)
LOADED_FRACTION = Gauge(
    "januslens_model_loaded_fraction",
    "Share of a model's loading that is done, from 0 to 1.",
    ["model"],
    multiprocess_mode="livemin",
)
# Kinds that are summed over processes; the others describe the whole machine.
DEVICE_MEMORY_NAME = "januslens_device_memory_bytes"
OF_PROCESSES = frozenset({"allocated", "reserved"})
DEVICE_MEMORY = Gauge(
    DEVICE_MEMORY_NAME,
    "Memory of a device in bytes, by kind.",
    ["device", "kind"],
    multiprocess_mode="liveall",
)
LOOP_LAG_SECONDS = Histogram(
    "januslens_event_loop_lag_seconds",
    "Delay of the event loop in seconds.",
    buckets=PART_BUCKETS,
)

# The metrics with the label `model`.
_OF_MODELS: tuple[Counter | Gauge, ...] = (
    TOKENS,
    MODEL_REQUESTS,
    EXPERIMENTS,
    MODEL_STATE,
    LOADED_FRACTION,
)


def remove_model(name: str) -> None:
    """Remove all series of a model that is unloaded."""
    for metric in _OF_MODELS:
        metric.remove_by_labels({"model": name})


LOOP_LAG_INTERVAL = 0.25


async def watch_event_loop() -> None:
    """Measure continuously how late the event loop wakes, which delays health checks and writes."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LOOP_LAG_INTERVAL
        await asyncio.sleep(LOOP_LAG_INTERVAL)
        LOOP_LAG_SECONDS.observe(max(0.0, loop.time() - due))
