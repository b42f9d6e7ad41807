"""The server's metrics page, read as Prometheus does."""

from __future__ import annotations

import time
from urllib.request import urlopen

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.support.calls import methods
from tests.support.server import ServerProcess

SERVICE = "januslens.v1.IntrospectionService"
UNFINISHED = ("januslens_queue_depth", "januslens_in_flight")


def page(server: ServerProcess) -> list[Metric]:
    """Return every family of samples."""
    with urlopen(server.metrics_url, timeout=10) as answer:  # noqa: S310 - the server's own, http
        return list(text_string_to_metric_families(answer.read().decode()))


def sample(server: ServerProcess, name: str, **labels: str) -> float:
    """Return one sample; 0 if nothing has been counted with these labels."""
    for family in page(server):
        for found in family.samples:
            if found.name == name and found.labels == labels:
                return float(found.value)
    return 0.0


def rpc_labels(method: str) -> dict[str, str]:
    """Return the labels that select the samples of a method."""
    kind = "server_stream" if methods()[method].server_streaming else "unary"
    return {"grpc_type": kind, "grpc_service": SERVICE, "grpc_method": method}


def unfinished(server: ServerProcess) -> float:
    """Return the number of requests that wait, run or are suspended."""
    # Use a single scrape, because a request may start between two.
    values = {f.name: f.samples[0].value for f in page(server) if f.name in UNFINISHED}
    return sum(values.values())


def wait_until_idle(server: ServerProcess, seconds: float = 10) -> None:
    """Wait until no request is unfinished; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while count := unfinished(server):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{count:g} requests are unfinished after {seconds:g} s")
        time.sleep(0.02)
