"""One metrics page for all processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, multiprocess
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from januslens_server import telemetry
from januslens_server.processes.metric_files import ReservedFile

# The class that MultiProcessCollector reads files with.
setattr(multiprocess, "MmapedDict", ReservedFile)  # noqa: B010 - not declared in the module's types


class AllProcesses(Collector):
    """Collects the metrics of running and ended processes from their files."""

    def __init__(self, folder: Path) -> None:
        """`folder` has the files."""
        self._files = MultiProcessCollector(None, str(folder))  # type: ignore[no-untyped-call]  # no annotations

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics, with the memory of all processes combined."""
        for metric in self._files.collect():  # type: ignore[no-untyped-call]  # no annotations
            yield (
                _combined_memory(metric) if metric.name == telemetry.DEVICE_MEMORY_NAME else metric
            )


def _combined_memory(memory: Metric) -> Metric:
    """Sum kinds of memory that belong to processes; of others, take the smallest value."""
    seen = defaultdict[tuple[str, str], list[float]](list)
    for sample in memory.samples:
        seen[sample.labels["device"], sample.labels["kind"]].append(sample.value)
    found = Metric(memory.name, memory.documentation, memory.type)
    for (device, kind), values in seen.items():
        value = sum(values) if kind in telemetry.OF_PROCESSES else min(values)
        found.add_sample(memory.name, {"device": device, "kind": kind}, value)
    return found


def registry(folder: Path) -> CollectorRegistry:
    """Return the registry of the metrics page."""
    found = CollectorRegistry()
    found.register(AllProcesses(folder))
    return found


def forget(folder: Path, number: int) -> None:
    """Remove the gauges of a process that has ended; its counters are kept."""
    mark_process_dead(number, str(folder))  # type: ignore[no-untyped-call]  # no annotations
