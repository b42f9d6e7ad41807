"""Who asks, what it is expected to cost, and whether it should go on."""

from __future__ import annotations

import threading
import time

from januslens_server.errors import DeadlinePassed, RequestCancelled
from januslens_server.results import Cost

ANONYMOUS = "anonymous"
FREE = Cost()


class Ticket:
    """Carried by a request from admission to its end; the compute thread asks it at every step.

    gRPC's own cancellation flags cannot be polled from another thread, hence an event of ours.
    """

    def __init__(self, seconds: float | None, caller: str = ANONYMOUS, cost: Cost = FREE) -> None:
        """`seconds` until the caller's deadline; None: it set none."""
        self.caller = caller
        self.cost = cost
        self.waited: float | None = None  # seconds until its first turn
        self.spent = 0.0  # seconds of the device so far
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """The caller went away."""
        self._cancelled.set()

    @property
    def failure(self) -> RequestCancelled | DeadlinePassed | None:
        """Why the request should stop; None while it may go on."""
        if self._cancelled.is_set():
            return RequestCancelled("the caller cancelled the request")
        if self._deadline is not None and time.monotonic() > self._deadline:
            return DeadlinePassed(
                "the request's deadline passed; ask for fewer layers or wait longer"
            )
        return None

    def check(self) -> None:
        """Raise `RequestCancelled` or `DeadlinePassed` if the request should stop."""
        failure = self.failure
        try:
            if failure is not None:
                raise failure
        finally:
            del failure  # a traceback's frame that names its error keeps both alive
