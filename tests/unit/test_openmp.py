"""The spin count of OpenMP threads is set before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from januslens_server.openmp import SPIN_COUNT, limit_spinning

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ({}, {"GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_the_operators_own_setting_is_kept(
    given: dict[str, str], then: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:  # set first, so that what is set below is taken back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    limit_spinning()
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == then


def test_the_command_sets_it_before_torch_is_imported() -> None:
    program = """
import sys
import januslens_server.__main__ as command
def told():
    print("torch" in sys.modules)
    raise SystemExit(0)
command.limit_spinning = told
sys.argv = ["januslens-server", "--port", "0"]
command.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.stdout.split() == ["False"], done.stderr
