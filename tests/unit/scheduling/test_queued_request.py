"""Test when a request should stop."""

import pytest

from januslens_server.errors import DeadlinePassed, RequestCancelled
from januslens_server.scheduling.job import QueuedRequest


@pytest.mark.parametrize("seconds", [None, 60.0])
def test_request_before_its_deadline_continues(seconds: float | None) -> None:
    QueuedRequest(seconds).check()


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_passed_deadline_ends_it(seconds: float) -> None:
    with pytest.raises(DeadlinePassed):
        QueuedRequest(seconds).check()


def test_a_cancelled_request_ends_whatever_its_deadline() -> None:
    for seconds in (None, 60.0, 0.0):
        request = QueuedRequest(seconds)
        request.cancel()
        with pytest.raises(RequestCancelled):
            request.check()
