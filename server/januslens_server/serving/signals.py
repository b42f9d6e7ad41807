"""What the process is told by signals."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable


def heed_signals(reload_callers: Callable[[], None]) -> asyncio.Event:
    """Gives what SIGTERM and SIGINT set; SIGHUP reads the callers anew."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, reload_callers)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop
