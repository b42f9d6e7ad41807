"""Search an index of rows whose order is easy to see."""

from __future__ import annotations

import torch

from januslens_server.lens.head import LensHead
from januslens_server.lens.norm import Norm
from januslens_server.lens.row_index import RowIndex, index_rows
from januslens_server.lens.unembedding import Unembedding

VOCAB = 6


def index(depth: int = 3, chunk_bytes: int = 4 * VOCAB) -> RowIndex:
    """Index rows with the logits [0, 5, 4, 4, 1, 2] and [9, 8, 7, 7, 7, 6], and a row of zeros."""
    logits = torch.tensor([[0.0, 5.0, 4.0, 4.0, 1.0, 2.0], [9.0, 8.0, 7.0, 7.0, 7.0, 6.0]])
    matrices = [torch.cat([logits, torch.zeros(1, VOCAB)])]
    reading = index_rows(head(chunk_bytes), matrices, depth)
    while True:
        try:
            next(reading)
        except StopIteration as read:
            rows: RowIndex = read.value
            return rows


def head(chunk_bytes: int = 4 * VOCAB) -> LensHead:
    """Return a head whose logits are the prepared vector, up to its length."""
    norm = Norm(torch.ones(VOCAB), None, 0.0, centred=False)
    return LensHead(norm, Unembedding(torch.eye(VOCAB)), chunk_bytes=chunk_bytes)


def test_ranks_count_strictly_larger_logits() -> None:
    rows = index(depth=5)
    assert listing(rows, 3, suppressed=False) == [(0, 1), (1, 2)]
    assert listing(rows, 1, suppressed=False) == [(0, 0), (1, 1)]


def test_ranks_from_the_bottom_count_strictly_smaller_logits() -> None:
    rows = index(depth=5)
    assert listing(rows, 3, suppressed=True) == [(0, 3), (1, 1)]
    assert listing(rows, 0, suppressed=True) == [(0, 0)]


def test_the_rank_from_the_top_is_given_for_both_ends() -> None:
    rows = index(depth=5)
    listed = rows.listing(3, suppressed=True)
    read = rows.readings(listed, VOCAB, 2, suppressed=True)
    assert read.target_ranks.flatten().tolist() == [1, 2]
    assert read.top_ids.tolist() == [[1, 2], [0, 1]]
    assert read.bottom_ids.tolist() == [[0, 4], [5, 2]]


def test_the_rank_from_the_top_counts_equal_logits_beyond_the_list() -> None:
    rows = index(depth=2)
    listed = rows.listing(2, suppressed=True)  # of three tokens with the same logit
    assert listed.rows.tolist() == [1]
    read = rows.readings(listed, VOCAB, 2, suppressed=True)
    assert read.target_ranks.flatten().tolist() == [2]


def test_tokens_below_the_depth_of_the_index_are_not_found() -> None:
    assert listing(index(depth=2), 4, suppressed=False) == []
    assert listing(index(depth=2), 5, suppressed=False) == []


def test_index_does_not_depend_on_the_chunk_size() -> None:
    whole, parts = index(chunk_bytes=2**20), index(chunk_bytes=1)
    for name, column in vars(whole).items():
        assert torch.allclose(column, vars(parts)[name], equal_nan=True), name


def listing(rows: RowIndex, token: int, *, suppressed: bool) -> list[tuple[int, int]]:
    """Return the rows with the token's rank in each."""
    listed = rows.listing(token, suppressed=suppressed)
    return list(zip(listed.rows.tolist(), listed.ranks.tolist(), strict=True))
