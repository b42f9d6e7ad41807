"""How torch's threads wait is said before torch is there to read it, and only once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from januslens_server.openmp import WAITING_TURNS, let_waiting_threads_sleep

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ({}, {"GOMP_SPINCOUNT": WAITING_TURNS}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_what_an_operator_has_set_stays(
    given: dict[str, str], then: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:  # set first, so that what is set below is taken back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    let_waiting_threads_sleep()
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == then


def test_the_command_says_it_before_torch_is_imported() -> None:
    program = """
import sys
import januslens_server.__main__ as command
def told():
    print("torch" in sys.modules)
    raise SystemExit(0)
command.let_waiting_threads_sleep = told
sys.argv = ["januslens-server", "--port", "0"]
command.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.stdout.split() == ["False"], done.stderr
