"""Fork servers from a process that has imported torch and transformers.

These imports take most of a server's start, and the tests start some sixty servers.
"""

from __future__ import annotations

import ctypes
import io
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from unittest.mock import patch

from januslens_server.tuning import SPIN_COUNT

# Imported by the process that forks, see `context`.
PRELOADED = ["januslens_server.serving.assembly", "januslens_server.serving.process"]
# OpenMP reads its variables when torch is imported: too early for those of a forked server. One
# thread adds in the same order in every run, and leaves cores to the test process.
OPENMP = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": SPIN_COUNT}
PR_SET_PDEATHSIG = 1


@cache
def context() -> ForkServerContext:
    server = get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    with patch.dict(os.environ, OPENMP):
        forkserver.ensure_running()
    return server


class ForkedServer:
    """A forked `januslens-server` with the part of `subprocess.Popen` that the tests use."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        log, output = context().Pipe(duplex=False)
        self._process = context().Process(
            target=_serve, args=(list(arguments), dict(environment), output)
        )
        with log, output:
            self._process.start()
            self.stdout: io.TextIOBase | None = os.fdopen(os.dup(log.fileno()), encoding="utf-8")
        self.pid = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """The exit status, or None while the server runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit status, or None while the server runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit status; raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("januslens-server", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal to the server."""
        os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def printed(program: str, *arguments: str) -> str:
    """Run a Python program in a forked process, and return what it prints; raises if it fails."""
    result, output = context().Pipe(duplex=False)
    process = context().Process(target=_execute, args=(program, arguments, output))
    with result, output:
        process.start()
        output.close()
        with os.fdopen(os.dup(result.fileno()), encoding="utf-8") as stream:
            text = stream.read()
    process.join()
    if process.exitcode != 0:
        raise subprocess.CalledProcessError(process.exitcode or 0, program, text)
    return text


def _execute(program: str, arguments: tuple[str, ...], output: Connection) -> None:
    """Become the program: its arguments and output."""
    with output:
        os.dup2(output.fileno(), 1)
    sys.argv = ["-c", *arguments]
    exec(program, {"__name__": "__main__"})  # noqa: S102 - a test's own program
    sys.stdout.flush()


def _serve(arguments: list[str], environment: Mapping[str, str], output: Connection) -> None:
    """Become the server: its arguments, environment, output and end with the forking process."""
    from januslens_server.__main__ import main

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with output:
        for standard in (1, 2):
            os.dup2(output.fileno(), standard)
    sys.argv = ["januslens-server", *arguments]
    os.environ.clear()
    os.environ.update(environment)
    main()
