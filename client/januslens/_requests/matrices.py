"""Kinds of matrices by name."""

from __future__ import annotations

from collections.abc import Iterable

from januslens._results.kinds import MATRIX_KINDS, MatrixKind
from januslens.v1 import gradient_lens_pb2


def matrix_numbers(
    kinds: Iterable[MatrixKind | str] | None,
) -> list[gradient_lens_pb2.MatrixKind.ValueType]:
    """None = FF1 and FF2; an empty list would mean that too, and surely was not meant.

    Raises:
        ValueError: There are none, or there is no such kind.
    """
    if kinds is None:
        return []
    named = [kinds] if isinstance(kinds, str) else list(kinds)
    if not named:
        raise ValueError("expected at least one kind for matrices; got none")
    return [MATRIX_KINDS.number(MatrixKind.of(kind)) for kind in named]
