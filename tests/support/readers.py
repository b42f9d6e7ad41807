"""Clients in separate processes, which tests kill."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.tethered import tethered

ROOT = Path(__file__).parents[2]

READER = """
import sys, time
import grpc
from januslens.v1 import service_pb2_grpc
from tests.support.calls import long_trace

channel = grpc.insecure_channel(sys.argv[1])
stream = service_pb2_grpc.IntrospectionServiceStub(channel).Trace(long_trace(40))
for _ in range(int(sys.argv[2])):
    next(stream)
print("reading", flush=True)
if sys.argv[3] == "stops":
    time.sleep(600)
for _ in stream:
    pass
"""


@contextmanager
def reader(address: str, messages: int, then: str) -> Iterator[None]:
    """Yield a client that has read some messages of a long stream; kill it at the end."""
    client = subprocess.Popen(
        tethered([sys.executable, "-c", READER, address, str(messages), then]),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    with client:
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == "reading\n"
            yield
        finally:
            client.kill()
