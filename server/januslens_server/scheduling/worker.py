"""The one thread that computes on a device.

Requests are generators. One runs until it ends or its reader has fallen behind; then it is set
aside, with the device free for the next, until the reader has caught up.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from januslens_server.errors import QueueFull, ServerDraining
from januslens_server.scheduling.outlet import Outlet
from januslens_server.scheduling.ticket import Ticket

T = TypeVar("T")
Checkpoint = Callable[[], None]


def _unchanged(error: Exception) -> Exception:
    return error


@dataclass(eq=False)
class _Job:
    steps: Iterator[Any]
    outlet: Outlet[Any]
    ticket: Ticket


class DeviceWorker:
    """Runs admitted requests one step at a time, in order of arrival."""

    def __init__(
        self, max_waiting: int, translate: Callable[[Exception], Exception] = _unchanged
    ) -> None:
        """Admit up to `max_waiting` requests beyond the one that runs.

        `translate` says in the service's terms what a request failed of.
        """
        self._max_waiting = max_waiting
        self._translate = translate
        self._jobs: deque[_Job] = deque()
        self._unfinished = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="device-worker", daemon=True)
        self._thread.start()

    @property
    def unfinished(self) -> int:
        """Requests admitted and not yet ended: waiting, running, or set aside."""
        return self._unfinished

    def submit(
        self, run: Callable[[Checkpoint], Iterator[T]], outlet: Outlet[T], ticket: Ticket
    ) -> None:
        """Admit a request; its results and its error go to `outlet`.

        `run` is handed the ticket's check, to call wherever it can stop early.

        Raises `QueueFull` at once if too many wait, `ServerDraining` if nothing new is taken.
        """
        with self._changed:
            if self._stopping:
                raise ServerDraining("the server is shutting down; ask another replica")
            if self._unfinished > self._max_waiting:
                raise QueueFull(f"{self._max_waiting} requests wait already; try again")
            self._unfinished += 1
            self._jobs.append(_Job(run(ticket.check), outlet, ticket))
            self._changed.notify_all()

    def refuse_new(self) -> None:
        """From now on admit nothing."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def wait_idle(self, seconds: float) -> bool:
        """Wait until nothing is unfinished; gives whether that came true in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._unfinished == 0, timeout=seconds)

    def _run(self) -> None:
        while True:
            # No name keeps a job here: what an ended one had captured is freed at once.
            self._advance(self._next())

    def _next(self) -> _Job:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._jobs))
            return self._jobs.popleft()

    def _advance(self, job: _Job) -> None:
        """Run one request until it ends or must let its reader catch up."""
        try:
            while True:
                job.ticket.check()
                job.outlet.put(next(job.steps))
                if job.outlet.when_drained(lambda: self._resume(job)):
                    return
        except StopIteration:
            self._end(job, None)
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to this request alone
            self._end(job, self._translate(error))

    def _resume(self, job: _Job) -> None:
        with self._changed:
            self._jobs.appendleft(job)
            self._changed.notify_all()

    def _end(self, job: _Job, error: Exception | None) -> None:
        if isinstance(job.steps, Generator):  # one that was stopped between two steps
            job.steps.close()
        with self._changed:
            self._unfinished -= 1
            self._changed.notify_all()
        job.outlet.close(error)
