"""Whether a request should go on."""

from __future__ import annotations

import threading
import time

from januslens_server.errors import DeadlinePassed, RequestCancelled


class Ticket:
    """Carried by a request from admission to its end; the compute thread asks it at every step.

    gRPC's own cancellation flags cannot be polled from another thread, hence an event of ours.
    """

    def __init__(self, seconds: float | None) -> None:
        """`seconds` until the caller's deadline; None: it set none."""
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """The caller went away."""
        self._cancelled.set()

    def check(self) -> None:
        """Raise `RequestCancelled` or `DeadlinePassed` if the request should stop."""
        if self._cancelled.is_set():
            raise RequestCancelled("the caller cancelled the request")
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise DeadlinePassed(
                "the request's deadline passed; ask for fewer layers or wait longer"
            )
