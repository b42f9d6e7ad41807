"""Start a server for one script or notebook, and connect a client to it."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from januslens._presentation import loading_step
from januslens.client import Client
from januslens.errors import LaunchError, Unavailable

logger = logging.getLogger("januslens.server")

# How often the models' states are read while they load, and how often progress is reported.
_POLL_SECONDS = 0.2
_PROGRESS_SECONDS = 5.0
# Lines of the server's log that an error quotes.
_QUOTED_LINES = 10
_STOP_SECONDS = 10.0

_Report = Callable[[str], object]

_NAMED = re.compile(r"[\w.:-]+=.+")


class LaunchedClient(Client):
    """The client of a server that `launch` started; closing it stops the server.

    The server also stops when this process ends, even if it is killed, and when the client is no
    longer referenced.

    Attributes:
        address: The server's address, for further clients and for the command `januslens`.
    """

    address: str

    def __init__(self, server: _LocalServer, address: str) -> None:
        super().__init__(address)
        self.address = address
        self._server = server
        self._stop = weakref.finalize(self, server.stop)

    def close(self) -> None:
        """Close the connection and stop the server; running calls are cancelled."""
        super().close()
        self._stop()


def _print_progress(text: str) -> None:
    print(f"januslens: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the default progress


def launch(
    *models: str | Path,
    timeout: float = 600.0,
    progress: Callable[[str], object] | None = _print_progress,
    **settings: object,
) -> LaunchedClient:
    """Start a server on this machine, wait until its models are loaded, and return its client.

    The server listens on a free port of the loopback interface. It stops when the client is closed
    and when this process ends::

        with januslens.launch("HuggingFaceTB/SmolLM2-135M-Instruct") as client:
            trace = client.trace("The Eiffel Tower is located in the city of")

    The server needs the extra `server`: `pip install 'januslens[server]'`.

    Args:
        models: Models to serve, each a folder, a GGUF file, a hub id, `HUB_ID@REVISION` or `NAME=`
            and one of these; the default name is the last part of the path. `demo` is the embedded
            model, which is also served without any.
        timeout: Maximum seconds until all models are loaded.
        progress: Called with a line of text at each step; None = report nothing. The default
            prints to standard error.
        settings: Further settings of `januslens-server`, such as `device="cuda"` or
            `row_cache="2GiB"`. `docs/operations.md` lists them.

    Raises:
        LaunchError: The server ended, a model did not load, or the time ran out. The server is
            stopped.
    """
    report = progress if progress is not None else (lambda _text: None)
    report("starting the server")
    started = time.monotonic()
    server = _LocalServer([*_model_flags(models), *_setting_flags(settings)])
    try:
        address = server.wait_for_address(started + timeout)
        client = LaunchedClient(server, address)
        _wait_for_models(client, server, started, timeout, report)
    except BaseException:
        server.stop()
        raise
    server.log.pass_on()
    report(f"ready on {address} after {time.monotonic() - started:.0f} s")
    return client


def _wait_for_models(
    client: Client, server: _LocalServer, started: float, timeout: float, report: _Report
) -> None:
    next_report = time.monotonic()
    while True:
        server.check_running()
        loading = ""
        with suppress(Unavailable):  # it logs its address just before it accepts calls
            models = client.list_models(timeout=timeout)
            if failed := [model for model in models if model.state == "FAILED"]:
                reasons = "; ".join(f"{model.name}: {model.state_reason}" for model in failed)
                raise LaunchError(f"model not loaded: {reasons}")
            if all(model.state == "READY" for model in models):
                return
            loading = ", ".join(
                f"{model.name}: {loading_step(model)}"
                for model in models
                if model.state == "LOADING"
            )
        now = time.monotonic()
        if now - started > timeout:
            raise LaunchError(
                f"models not loaded within {timeout:g} s: {loading}; pass a longer timeout"
            )
        if now >= next_report and loading:
            report(f"loading {loading} ({now - started:.0f} s)")
            next_report = now + _PROGRESS_SECONDS
        time.sleep(_POLL_SECONDS)


def _model_flags(models: tuple[str | Path, ...]) -> list[str]:
    flags = []
    for model in map(str, models):
        named = _NAMED.fullmatch(model) is not None and not Path(model).exists()
        flags += ["--model", model if named else f"{_default_name(model)}={model}"]
    return flags


def _default_name(model: str) -> str:
    """Return the last part of a path or hub id, without its revision and `.gguf`."""
    return Path(model.partition("@")[0]).resolve().name.removesuffix(".gguf")


def _setting_flags(settings: dict[str, object]) -> list[str]:
    flags = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if item is True:
                flags.append(flag)
            elif item is not False and item is not None:
                flags += [flag, str(item)]
    return flags


class _LocalServer:
    """A running `januslens-server` and the end of its log."""

    def __init__(self, flags: list[str]) -> None:
        # The server logs JSON lines, and stops when its standard input ends. A session of its own
        # keeps Ctrl-C for this process.
        fixed = ["--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]
        watched = ["--log-format", "json", "--stop-with-input"]
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, without a shell
            [sys.executable, "-m", "januslens_server", *fixed, *flags, *watched],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.log = _Log()
        if self._process.stderr is not None:
            reader = threading.Thread(
                target=self.log.read, args=(self._process.stderr,), daemon=True
            )
            reader.start()

    def wait_for_address(self, deadline: float) -> str:
        """Return the address once the server has logged it."""
        while not self.log.changed.wait(_POLL_SECONDS):
            self.check_running()
            if time.monotonic() > deadline:
                raise LaunchError(f"the server did not start in time; its log:\n{self.log.text}")
        self.check_running()
        return self.log.address

    def check_running(self) -> None:
        """Raise `LaunchError` with the end of the log if the process has ended."""
        status = self._process.poll()
        if status is not None:
            self.log.ended.wait(_STOP_SECONDS)
            raise LaunchError(f"the server ended with status {status}:\n{self.log.text}")

    def stop(self) -> None:
        """Stop the process, at first politely."""
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _Log:
    """The log of a server: its address, and its last lines for error messages."""

    def __init__(self) -> None:
        self.address = ""
        self.changed = threading.Event()
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._lines: deque[str] = deque(maxlen=_QUOTED_LINES)
        self._warnings: list[tuple[int, str]] | None = []  # until they are passed on

    @property
    def text(self) -> str:
        return "\n".join(self._lines)

    def read(self, stream: IO[str]) -> None:
        """Read the log until it ends."""
        with stream:
            for line in stream:
                self._take(line.rstrip("\n"))
        self.ended.set()

    def _take(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except ValueError:  # from a library, or an error before logging is configured
            entry = {"message": line}
        if not isinstance(entry, dict):
            entry = {"message": line}
        message = str(entry.get("message", line))
        self._lines.append(message)
        if address := entry.get("address"):
            self.address = str(address)
            self.changed.set()
        level = logging.getLevelName(str(entry.get("level", "info")).upper())
        if isinstance(level, int) and level >= logging.WARNING:
            with self._lock:
                if self._warnings is not None:
                    self._warnings.append((level, message))
                    return
            logger.log(level, "%s", message)

    def pass_on(self) -> None:
        """Pass warnings and errors on to `logging`, the earlier ones now.

        They are held until the launch succeeds, because an error of the launch quotes them.
        """
        with self._lock:
            held, self._warnings = self._warnings or [], None
        for level, message in held:
            logger.log(level, "%s", message)
