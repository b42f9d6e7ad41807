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

# Most rows start servers of their own, so `make test` runs two that do not.
TWO_ROWS = pytest.param(["trace", "gradient"], id="two rows")
EVERY_ROW = pytest.param([*program.ROWS, *program.PER_NODE], marks=pytest.mark.soak, id="every row")


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


def test_the_steps_of_the_gpu_run_measure_and_leave_nothing_behind(tmp_path: Path) -> None:
    arguments = ["--tiny", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path)]
    steps = {name: step for name, step in gpu.STEPS.items() if name != "self-test"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "STEPS", steps)  # the self-test would run pytest in pytest
        done = CliRunner().invoke(gpu.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [written["notes"][name] for name in steps] == ["done"] * len(steps)
    assert written["notes"]["missing packages"] == []
    rows = {row["name"]: row for row in written["rows"]}
    assert all(row["reached"] for name, row in rows.items() if "CPU" in name or "bit" in name)
    assert len(rows) == 6 + 3 + 4


def test_a_step_that_fails_or_finds_no_time_does_not_end_the_gpu_run(tmp_path: Path) -> None:
    def broken(_run: gpu.Run) -> list[Row]:
        raise RuntimeError("no such kernel")

    def slow(run: gpu.Run) -> list[Row]:
        run.ends = 0.0
        return [Row("slow", 1.0, "s", None, "")]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "STEPS", {"broken": broken, "slow": slow, "late": slow})
        done = CliRunner().invoke(gpu.main, ["--device", "cpu", "--out", str(tmp_path)])
    assert done.exit_code == 1
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["notes"]["broken"] == "failed: RuntimeError: no such kernel"
    assert [row["name"] for row in written["rows"]] == ["slow"]
    assert "late: not started: no time left" in done.output
