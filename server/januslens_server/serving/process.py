"""Run a server as one process, from its settings to its exit status."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from januslens_server import spans


def live(serving: Coroutine[Any, Any, int | None]) -> NoReturn:
    """Run until it is over, and leave with the status that it gives; with 1 if it cannot begin."""
    try:
        status = asyncio.run(serving)
    except OSError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"januslens-server: {line}\n")
        raise SystemExit(1) from error
    # A thread that loads or computes cannot be stopped inside native code, and would turn an
    # orderly exit into an abort.
    spans.shutdown()
    logging.shutdown()
    os._exit(status or 0)


def heed_signals(reload_callers: Callable[[], None]) -> asyncio.Event:
    """Gives what SIGTERM and SIGINT set; SIGHUP reads the callers anew."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, reload_callers)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop
