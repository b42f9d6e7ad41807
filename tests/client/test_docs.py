"""Run the examples of docs/client.md and docs/experiments.md."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "client.md"
EXPERIMENTS = GUIDE.with_name("experiments.md")
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
DEFAULT = "127.0.0.1:50051"


def test_every_example_of_the_guide_runs(
    server_address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("probe.npy", np.eye(2, 128, dtype=np.float32))
    examples = EXAMPLE.findall(GUIDE.read_text())
    assert len(examples) == 25
    names: dict[str, object] = {"__name__": "guide"}
    for example in examples:
        code = compile(example.replace(DEFAULT, server_address), GUIDE.name, "exec")
        exec(code, names)  # noqa: S102 - our own documentation
    printed = capsys.readouterr().out
    assert "␣Tokyo" in printed
    assert "BOTTOM" in printed
    assert "layers" in printed  # the field that the last example gets wrong


MEASURED = re.compile(
    r"^```python\n((?:(?!^```).)*)^```\n\n```text\n(.*?)^```", re.MULTILINE | re.DOTALL
)
NUMBER = re.compile(r"[-+]?\d+\.\d+")


def test_experiments_print_the_documented_effects(
    server_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = MEASURED.findall(EXPERIMENTS.read_text())
    assert len(examples) == len(EXAMPLE.findall(EXPERIMENTS.read_text())) == 6
    names: dict[str, object] = {"__name__": "experiments"}
    for example, documented in examples:
        code = compile(example.replace(DEFAULT, server_address), EXPERIMENTS.name, "exec")
        exec(code, names)  # noqa: S102 - our own documentation
        printed = capsys.readouterr().out
        assert NUMBER.sub("", printed).split() == NUMBER.sub("", documented).split()
        expected = [float(number) for number in NUMBER.findall(documented)]
        assert [float(number) for number in NUMBER.findall(printed)] == pytest.approx(
            expected, abs=0.05
        )
