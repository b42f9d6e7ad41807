"""Run the real server as a separate process, as an operator starts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.support.forked import ForkedServer
from tests.support.tethered import tethered

SERVING = re.compile(r"serving on (\S+:\d+)")
HEALTH = re.compile(r"health on (\S+:\d+)")
METRICS = re.compile(r"metrics on (http://\S+/metrics)")
START_SECONDS = 120
PROGRAM = (sys.executable, "-m", "januslens_server")


@dataclass
class ServerProcess:
    """A running server, with its addresses and its log so far."""

    process: subprocess.Popen[str] | ForkedServer
    lines: list[str] = field(default_factory=list)
    reader: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        """Read the log while the server runs."""
        self.reader = threading.Thread(target=_read, args=(self,), daemon=True)
        self.reader.start()

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    @property
    def address(self) -> str:
        return self._found(SERVING)

    @property
    def health_address(self) -> str:
        return self._found(HEALTH)

    @property
    def metrics_url(self) -> str:
        return self._found(METRICS)

    def _found(self, pattern: re.Pattern[str]) -> str:
        match = pattern.search(self.log)
        if match is None:
            raise LookupError(f"expected a line matching {pattern.pattern!r} in:\n{self.log}")
        return match.group(1)

    def wait_for(self, text: str, seconds: float = START_SECONDS) -> None:
        """Wait for a log line with `text`; fails with the log if the server ends or is too slow."""
        deadline = time.monotonic() + seconds
        while text not in self.log:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"expected {text!r} within {seconds} s in:\n{self.log}")
            time.sleep(0.02)


@contextmanager
def running_server(
    *flags: str,
    until: str = "ready",
    environment: Mapping[str, str] | None = None,
    within: Sequence[str] = (),
    program: Sequence[str] = PROGRAM,
    seconds: float = START_SECONDS,
) -> Iterator[ServerProcess]:
    """Start the server on free ports, wait until it logs `until`, and end it at the end.

    `environment` adds to that of this process; `within` is a command that runs the server's
    `program`.
    """
    arguments = ["--port", "0", "--metrics-port", "0", *flags]
    server = start_server(arguments, environment, [*within, *program])
    try:
        server.wait_for(until, seconds)
        yield server
    finally:
        if server.process.poll() is None:
            server.process.terminate()
        try:
            server.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()


def start_server(
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    program: Sequence[str] = PROGRAM,
) -> ServerProcess:
    """Start the server, which ends with this process, and read its log while it runs.

    The plain command is forked from a process that has its libraries loaded. Other programs are
    started as an operator does.
    """
    # One thread adds in the same order in every run, and leaves cores to the test process.
    variables = (
        os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | dict(environment or {})
    )
    process: subprocess.Popen[str] | ForkedServer
    if tuple(program) == PROGRAM:
        process = ForkedServer(arguments, variables)
    else:
        process = subprocess.Popen(
            tethered([*program, *arguments]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=variables,
        )
    return ServerProcess(process)


def _read(server: ServerProcess) -> None:
    if server.process.stdout is not None:
        with server.process.stdout as log:
            for line in log:
                server.lines.append(line.rstrip("\n"))
