"""One metrics page of all processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from januslens_server import telemetry


class AllProcesses(Collector):
    """Sums of what the processes keep in their files, present and former ones."""

    def __init__(self, folder: Path) -> None:
        """`folder` is where the processes count."""
        self._files = MultiProcessCollector(None, str(folder))  # type: ignore[no-untyped-call]  # as shipped

    def collect(self) -> Iterable[Metric]:
        """Every family of samples."""
        for metric in self._files.collect():  # type: ignore[no-untyped-call]  # as shipped
            yield _of_machine(metric) if metric.name == telemetry.DEVICE_MEMORY_NAME else metric


def _of_machine(memory: Metric) -> Metric:
    """Memory: what processes take adds up, what the machine has is seen by each of them."""
    seen = defaultdict[tuple[str, str], list[float]](list)
    for sample in memory.samples:
        seen[sample.labels["device"], sample.labels["kind"]].append(sample.value)
    found = Metric(memory.name, memory.documentation, memory.type)
    for (device, kind), values in seen.items():
        value = sum(values) if kind in telemetry.OF_PROCESSES else min(values)
        found.add_sample(memory.name, {"device": device, "kind": kind}, value)
    return found


def registry(folder: Path) -> CollectorRegistry:
    """What the metrics port shows."""
    found = CollectorRegistry()
    found.register(AllProcesses(folder))
    return found


def forget(folder: Path, number: int) -> None:
    """A process has ended: what it was just now is no more, what it counted stays."""
    mark_process_dead(number, str(folder))  # type: ignore[no-untyped-call]  # as shipped
