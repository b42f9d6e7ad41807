"""Measure a request: seconds by stage, and vectors projected."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from januslens_server import telemetry
from januslens_server.errors import CancelCheck
from januslens_server.lens.head import LensHead
from januslens_server.lens.projection import PendingTable, start_projection
from januslens_server.results import ProjectionTable, StageTime
from januslens_server.specs import LensSpec


class StageClock:
    """Adds up wall-clock seconds under each stage's name, in order of first use."""

    def __init__(self, rpc: str) -> None:
        """`rpc` names the RPC of these stages in metrics."""
        self._rpc = rpc
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the seconds inside the context under `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere under `name`."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        telemetry.STAGE_SECONDS.labels(self._rpc, name).observe(seconds)

    def times(self) -> tuple[StageTime, ...]:
        """Return the seconds of all stages so far."""
        return tuple(StageTime(name, seconds) for name, seconds in self._seconds.items())


def read(
    head: LensHead,
    vectors: torch.Tensor,
    spec: LensSpec,
    targets: torch.Tensor | None,
    check_cancelled: CancelCheck,
) -> ProjectionTable:
    """Call `lens.projection.project`, and count the vectors in the metrics."""
    return start_reading(head, vectors, spec, targets, check_cancelled).table()


def start_reading(
    head: LensHead,
    vectors: torch.Tensor,
    spec: LensSpec,
    targets: torch.Tensor | None,
    check_cancelled: CancelCheck,
) -> PendingTable:
    """Call `lens.projection.start_projection`, and count the vectors in the metrics."""
    telemetry.VECTORS_PROJECTED.inc(len(vectors))
    return start_projection(head, vectors, spec, targets, check_cancelled)
