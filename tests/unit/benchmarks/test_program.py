"""The benchmark program runs; its figures are for `make bench` on an idle machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tests.benchmarks import __main__ as program
from tests.benchmarks import gpu
from tests.benchmarks.report import Row
from tests.benchmarks.shapes import TINY, build

# Most rows start servers of their own, so `make test` runs two that do not.
TWO_ROWS = pytest.param(["trace", "gradient"], id="two rows")
EVERY_ROW = pytest.param([*program.ROWS], marks=pytest.mark.soak, id="every row")


@pytest.mark.parametrize("rows", [TWO_ROWS, EVERY_ROW])
def test_the_tables_rows_are_measured_and_written(tmp_path: Path, rows: list[str]) -> None:
    threads = str(torch.get_num_threads())
    arguments = ["--tiny", "--rounds", "1", "--threads", threads, "--out", str(tmp_path)]
    arguments += [argument for row in rows for argument in ("--rows", row)]
    done = CliRunner().invoke(program.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    written = json.loads((tmp_path / "bench.json").read_text())
    measured = {row["name"]: row for row in written["rows"]}
    assert len(written["rows"]) == len(measured) >= len(rows)
    assert all(name.split(",")[0] in done.output.replace("\n", " ") for name in measured)
    ratios = [row["measured"] for row in measured.values() if row["unit"] == "x"]
    assert all(0 < ratio < float("inf") for ratio in ratios)
    assert all(row["reached"] in {True, False} for row in written["rows"] if row["goal"])


def test_goals_are_upper_or_lower_bounds() -> None:
    assert Row("", 1.2, "x", 1.25, "").reached is True
    assert Row("", 1.3, "x", 1.25, "").reached is False
    assert Row("", 1.3, "x", 1.25, "", at_least=True).reached is True
    assert Row("", 1.3, "x", None, "").reached is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_benchmark_without_a_gpu_exits_with_a_message() -> None:
    done = CliRunner().invoke(gpu.main, [])
    assert (done.exit_code, done.output.strip()) == (2, "needs a GPU: torch finds no CUDA device")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_rows_are_measured(tmp_path: Path) -> None:
    from tests.benchmarks.bench import bench

    build(TINY, tmp_path, torch.bfloat16)
    with bench(TINY, tmp_path, 1, 1, "cuda", "bfloat16") as measured:
        assert [row.unit for row in gpu.measure(measured)] == ["ms"] * 4 + ["MiB"]
