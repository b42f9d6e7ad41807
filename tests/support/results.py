"""Results of a pipeline that is run without a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np

from januslens_server.results import GradientSummary, TraceSummary

T = TypeVar("T")


def only(results: Iterator[T | None]) -> T:
    """Return its only result, without the points at which a server could pause it."""
    (result,) = [result for result in results if result is not None]
    return result


def same(a: Any, b: Any) -> bool:
    """Compare bit by bit; NaN equals NaN. Times are not compared."""
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))
    if isinstance(a, TraceSummary | GradientSummary):
        a, b = replace(a, times=()), replace(b, times=())
    if is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, Sequence) and not isinstance(a, str | bytes):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
