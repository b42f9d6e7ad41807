"""Sizes and lists of names in errors, and the advice in errors of failed computations."""

from __future__ import annotations

import pytest

from januslens_server.errors import LimitExceeded, NotFinite, readable_size, shortlist
from januslens_server.results import Cost
from januslens_server.rpc.admission import Admission, Limits


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 * 2**19, "1.5 MiB"), (2**31, "2.00 GiB")],
)
def test_sizes_are_in_powers_of_1024(count: int, text: str) -> None:
    assert readable_size(count) == text


def test_long_lists_of_names_are_counted() -> None:
    assert shortlist(["a", "b", "c"]) == "a, b, c"
    assert shortlist(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_advice_follows_the_problem() -> None:
    assert str(NotFinite("x is NaN")) == "x is NaN"
    assert str(NotFinite("x is NaN", "use another prompt")) == "x is NaN; use another prompt"
    both = NotFinite("x is NaN", "use another prompt", "serve it in float32")
    assert str(both) == "x is NaN; use another prompt, or serve it in float32"
    assert str(NotFinite("x is NaN", "", "serve it in float32")) == "x is NaN; serve it in float32"


def exceeded(stream: int, limit: int) -> str:
    limits = Limits(seconds=1.0, memory=None, stream=limit)
    admission = Admission(limits, {}, lambda _: 2.0**40)
    (violation,) = admission.exceeded(Cost(0.0, 0, stream, 0))
    assert (violation.allowed, violation.estimated) == (limit, stream)
    return str(LimitExceeded([violation]))


def test_a_limit_that_rounds_to_the_estimate_is_given_in_bytes() -> None:
    assert "estimated at up to 3.0 MiB, limit 2.0 MiB for" in exceeded(3 * 2**20, 2 * 2**20)
    assert "up to 2097153 bytes, limit 2097152 bytes for" in exceeded(2**21 + 1, 2**21)
