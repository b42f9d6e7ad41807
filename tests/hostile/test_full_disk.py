"""A full temporary folder makes metrics incomplete, but ends no process."""

from __future__ import annotations

import logging
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest
from prometheus_client.mmap_dict import mmap_key

from januslens.v1 import models_pb2, service_pb2_grpc
from januslens_server.processes import metrics
from januslens_server.processes.metric_files import RESERVED_BYTES, ReservedFile
from tests.support.server import running_server


@pytest.fixture(autouse=True)
def never_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReservedFile, "_warned", False)


@pytest.fixture
def small_files() -> Iterator[None]:
    """Simulate a full disk: no file can be as large as the reserved size."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (RESERVED_BYTES // 2, kept[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, kept)


def count(file: ReservedFile, series: int) -> None:
    for i in range(series):
        file.write_value(f"series {i}", float(i), 0.0)
    assert [file.read_value(f"series {i}")[0] for i in range(series)] == list(range(series))


def test_metrics_are_written_to_disk_and_continued_by_a_replacement(tmp_path: Path) -> None:
    path = tmp_path / "counter_1.db"
    series = RESERVED_BYTES // 20  # more than were reserved at first
    with closing(ReservedFile(str(path))) as file:
        count(file, series)
    assert path.stat().st_blocks * 512 >= path.stat().st_size > RESERVED_BYTES
    with closing(ReservedFile(str(path))) as file:
        assert file.read_value(f"series {series - 1}")[0] == series - 1


@pytest.mark.usefixtures("small_files")
def test_without_disk_space_metrics_stay_in_memory_and_are_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("counter_1.db", "histogram_1.db"):
        count(ReservedFile(str(tmp_path / name)), RESERVED_BYTES // 20)
    assert list(tmp_path.iterdir()) == []
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no space for counter_1.db" in record.getMessage()


def test_disk_that_fills_up_later_ends_no_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    with closing(ReservedFile(str(tmp_path / "counter_1.db"))) as file:
        count(file, 10)
        request.getfixturevalue("small_files")
        count(file, RESERVED_BYTES // 20)
    assert len(caplog.records) == 1
    shown = dict(entry[:2] for entry in ReservedFile.read_all_values_from_file(file._fname))
    assert shown["series 9"] == 9


def test_removed_series_leave_their_places_to_others(tmp_path: Path) -> None:
    """Files of 300 models, one after another, are as large as those of one."""
    path, other = tmp_path / "counter_1.db", tmp_path / "counter_2.db"
    sizes = set()
    with closing(ReservedFile(str(path))) as file, closing(ReservedFile(str(other))) as second:
        file.write_value(mmap_key("m", "m_total", ["model"], ["demo"], "Help."), 7.0, 0.0)
        for i in range(100, 400):
            key = mmap_key("m", "m_total", ["model"], [f"né {i}"], "Help.")
            assert file.read_value(key)[0] == 0.0
            file.write_value(key, 1.0, 0.0)
            second.write_value(key, 2.0, 0.0)
            assert totals(tmp_path) == {"demo": 7.0, f"né {i}": 3.0}
            file.remove("model", f"né {i}")
            assert totals(tmp_path) == {"demo": 7.0, f"né {i}": 2.0}
            second.remove("model", f"né {i}")
            assert totals(tmp_path) == {"demo": 7.0}
            sizes.add((file._used, second._used))
    assert len(sizes) == 1
    with closing(ReservedFile(str(path))) as replacement:
        replacement.write_value(mmap_key("m", "m_total", ["model"], ["né 9 1"], "Help."), 1.0, 0.0)
        assert (replacement._used, second._used) in sizes
    assert totals(tmp_path) == {"demo": 7.0, "né 9 1": 1.0}


def totals(folder: Path) -> dict[str, float]:
    """Read the files as the metrics page does."""
    found = metrics.registry(folder).collect()
    return {sample.labels["model"]: sample.value for metric in found for sample in metric.samples}


def test_two_processes_serve_on_a_full_temporary_folder(tmp_path: Path) -> None:
    within = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", SMALL, str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run([*within, "true"], check=False).returncode:
        pytest.skip("this machine lets no user mount a file system of its own")
    with (
        running_server("--processes", "2", within=within, seconds=180) as server,
        grpc.insecure_channel(server.address.split()[0]) as channel,
    ):
        stub = service_pb2_grpc.IntrospectionServiceStub(channel)
        (model,) = stub.ListModels(models_pb2.ListModelsRequest()).models
        assert model.state == models_pb2.Model.STATE_READY
        with urlopen(server.metrics_url, timeout=10) as page:  # noqa: S310 - the server's own, http
            assert page.status == 200
    incomplete = [line for line in server.lines if "metrics of this process are incomplete" in line]
    assert len(incomplete) == 2
    assert "status 135" not in server.log


SMALL = 'mount -t tmpfs -o size=128k tmpfs "$0" && export TMPDIR="$0" && exec "$@"'
