"""Servers and programs forked from a process that has imported torch."""

from __future__ import annotations

import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from tests.support.forked import OPENMP, context, printed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/environ")


def test_torch_is_imported_with_the_variables_of_a_server_that_is_started() -> None:
    ours, theirs = context().Pipe(duplex=False)
    process = context().Process(target=_send_environment, args=(theirs,))
    process.start()
    given = ours.recv()
    process.join()
    assert OPENMP.items() <= given.items()


def test_a_program_gets_its_arguments_and_its_failure_is_raised() -> None:
    assert printed("import sys; print(sys.argv[1] * 2)", "ab") == "abab\n"
    with pytest.raises(subprocess.CalledProcessError) as failed:
        printed("print('half'); raise SystemExit(3)")
    assert (failed.value.returncode, failed.value.output) == (3, "half\n")


def _send_environment(output: Connection) -> None:
    # As it was when the forking process started.
    lines = Path("/proc/self/environ").read_text("utf-8").split("\0")
    output.send(dict(line.split("=", 1) for line in lines if "=" in line))
