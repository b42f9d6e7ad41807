"""Quotas, on a clock that the tests advance."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from januslens_server.access.callers import Caller, Quotas
from januslens_server.access.quotas import QuotaBook
from januslens_server.errors import QuotaSpent


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(clock: Clock) -> QuotaBook:
    return QuotaBook(clock)


def ada(**quotas: float) -> Caller:
    return Caller(name="ada", tokens=(), quotas=Quotas.model_validate(quotas))


def test_without_quotas_nothing_is_limited(book: QuotaBook) -> None:
    with ExitStack() as requests:
        for _ in range(1000):
            requests.enter_context(book.request(ada()))
            book.charge(ada(), 1e9)


def test_concurrent_requests_are_limited(book: QuotaBook) -> None:
    two = ada(concurrent=2)
    with book.request(two), book.request(two):
        with (
            pytest.raises(QuotaSpent, match="'ada' used up: 2 concurrent"),
            book.request(two),
        ):
            pass
        with book.request(Caller(name="bob", tokens=(), quotas=Quotas(concurrent=2))):
            pass
    with book.request(ada(concurrent=2)):
        pass


def test_a_failed_request_no_longer_counts(book: QuotaBook) -> None:
    for _ in range(3):
        with pytest.raises(KeyError), book.request(ada(concurrent=1)):
            raise KeyError


def test_a_minutes_allowance_can_be_used_at_once_and_refills_evenly(
    book: QuotaBook, clock: Clock
) -> None:
    caller = ada(requests_per_minute=6)

    def ask() -> None:
        with book.request(caller):
            pass

    for _ in range(6):
        ask()
    with pytest.raises(QuotaSpent) as spent:
        ask()
    assert spent.value.retry_after == pytest.approx(10)
    clock.seconds += 9.9
    with pytest.raises(QuotaSpent):
        ask()
    clock.seconds += 0.2
    ask()
    with pytest.raises(QuotaSpent):
        ask()
    clock.seconds += 3600
    for _ in range(6):
        ask()
    with pytest.raises(QuotaSpent):
        ask()


def test_rates_below_one_request_a_minute(book: QuotaBook, clock: Clock) -> None:
    caller = ada(requests_per_minute=0.5)
    with book.request(caller):
        pass
    clock.seconds += 119
    with pytest.raises(QuotaSpent) as spent, book.request(caller):
        pass
    assert spent.value.retry_after == pytest.approx(1)
    clock.seconds += 1.001
    with book.request(caller):
        pass


def test_device_seconds_are_charged_as_estimated_and_corrected(
    book: QuotaBook, clock: Clock
) -> None:
    caller = ada(device_seconds_per_minute=30)
    book.charge(caller, 50)  # more than a minute brings
    with pytest.raises(QuotaSpent) as spent:
        book.charge(caller, 1)
    assert spent.value.retry_after == pytest.approx(40)  # 20 s of debt at half a second a second
    book.settle(caller, -40)
    book.charge(caller, 19)
    book.charge(caller, 2)
    clock.seconds += 1
    with pytest.raises(QuotaSpent):
        book.charge(caller, 1)
    clock.seconds += 2
    book.charge(caller, 1)


def test_generated_tokens_are_charged_as_requested_and_corrected(
    book: QuotaBook, clock: Clock
) -> None:
    caller = ada(generated_tokens_per_minute=60)
    book.charge(caller, 5.0, 100)
    with pytest.raises(QuotaSpent, match="60 generated tokens a minute") as spent:
        book.charge(caller, 5.0, 1)
    assert spent.value.retry_after == pytest.approx(40)  # 40 tokens of debt at one a second
    book.charge(caller, 5.0)  # requests that generate nothing are not affected
    book.settle(caller, 0.0, -90)
    book.charge(caller, 5.0, 50)
    clock.seconds += 1
    book.charge(caller, 5.0, 1)


def test_a_changed_quota_keeps_the_usage(book: QuotaBook) -> None:
    book.charge(ada(device_seconds_per_minute=30), 30.5)
    with pytest.raises(QuotaSpent, match="60 device seconds a minute"):
        book.charge(ada(device_seconds_per_minute=60), 1)
