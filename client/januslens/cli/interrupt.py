"""Ctrl-C, also where Python loses it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from januslens.errors import JanuslensError


@contextmanager
def interruptible(cancel: Callable[[], object]) -> Iterator[None]:
    """Let the first Ctrl-C call `cancel` and end the block with `KeyboardInterrupt`.

    Python raises it wherever the main thread is, and inside gRPC's compiled code it is at times
    swallowed. So a thread of its own cancels as well: then the call fails, and that is the end.
    """
    interrupt = signal.getsignal(signal.SIGINT)
    if not callable(interrupt) or threading.current_thread() is not threading.main_thread():
        yield  # whoever runs us handles the signal
        return
    interrupted = threading.Event()

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if not interrupted.is_set():
            interrupted.set()
            threading.Thread(target=cancel, name="interrupt", daemon=True).start()
        interrupt(number, frame)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    except (JanuslensError, ValueError) as error:  # gRPC's ValueError: the channel is closed
        if interrupted.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, interrupt)
