"""Test which parts of a sum become nodes."""

from __future__ import annotations

import pytest
import torch

from januslens_server.graph.weighted_rows import extremes, largest, left_out

SCORES = torch.tensor([2.0, -1.0, 5.0, 2.0, -3.0, -1.0])


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [2]), (3, [2, 0, 3]), (0, [2, 0, 3, 1, 5, 4]), (99, [2, 0, 3, 1, 5, 4])],
)
def test_largest_values_come_first_and_ties_are_ordered_by_index(
    count: int, expected: list[int]
) -> None:
    assert largest(SCORES, count).tolist() == expected


def test_rows_are_selected_independently() -> None:
    rows = torch.stack([SCORES, -SCORES])
    assert largest(rows, 2).tolist() == [[2, 0], [4, 1]]


@pytest.mark.parametrize(
    ("top", "bottom", "expected"),
    [
        (1, 1, [2, 4]),
        (2, 3, [2, 0, 4, 1, 5]),
        (1, 0, [2]),
        (0, 3, [2, 0, 3, 1, 5, 4]),
        (4, 4, [2, 0, 3, 1, 4, 5]),
        (99, 99, [2, 0, 3, 1, 5, 4]),
    ],
)
def test_top_and_bottom_selections_do_not_overlap(
    top: int, bottom: int, expected: list[int]
) -> None:
    picked = extremes(SCORES, top, bottom)
    assert picked.numbers == picked.rows.tolist() == expected


def test_every_part_is_either_selected_or_in_other() -> None:
    picked = extremes(SCORES, 2, 1).rows
    rest = left_out(len(SCORES), picked)
    assert sorted([*picked.tolist(), *rest.nonzero()[:, 0].tolist()]) == list(range(len(SCORES)))
    of_rows = left_out(4, torch.tensor([[0, 1], [3, 0]]))
    assert of_rows.tolist() == [[False, False, True, True], [False, True, True, False]]
