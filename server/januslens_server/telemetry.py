"""Metric names and log set-up."""

from __future__ import annotations

import logging
import sys

from prometheus_client import Counter, Gauge, Histogram

STARTED = Counter("grpc_server_started", "RPCs started.", ["grpc_method"])
HANDLED = Counter("grpc_server_handled", "RPCs completed.", ["grpc_method", "grpc_code"])
HANDLING_SECONDS = Histogram(
    "grpc_server_handling_seconds", "Seconds from start to completion of RPCs.", ["grpc_method"]
)
UNFINISHED = Gauge("januslens_requests_unfinished", "Requests that wait, run or are set aside.")
MODEL_READY = Gauge("januslens_model_ready", "1 where a configured model is READY.", ["model"])


def configure_logging(level: str) -> None:
    """Log lines to standard error: time, level, logger, message."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
