"""Run a process until its exit status, and handle signals."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from januslens_server import spans


def run_process(serving: Coroutine[Any, Any, int | None]) -> NoReturn:
    """Run `serving` and exit with the status it returns, or with 1 and one line on `OSError`."""
    try:
        status = asyncio.run(serving)
    except OSError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"januslens-server: {line}\n")
        raise SystemExit(1) from error
    # Threads that load or compute cannot be stopped inside native code; a normal interpreter exit
    # would abort the process.
    spans.shutdown()
    logging.shutdown()
    os._exit(status or 0)


def handle_signals(reload_callers: Callable[[], None]) -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set; SIGHUP calls `reload_callers`."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, reload_callers)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


def stop_with_input() -> None:
    """Stop this process as SIGTERM does when its standard input ends.

    The kernel closes a parent's end of a pipe when the parent ends, whatever ended it.
    """

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="input", daemon=True).start()
