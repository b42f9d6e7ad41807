"""Projections with cached rows are bit-identical to those without, whatever was cached before."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from januslens_server.errors import RequestCancelled
from januslens_server.lens.head import LensHead
from januslens_server.lens.norm import Norm
from januslens_server.lens.projection import project
from januslens_server.lens.row_cache import ROWS, RowCache
from januslens_server.lens.unembedding import Unembedding
from januslens_server.results import ProjectionTable
from januslens_server.specs import LensKind, LensSpec

VOCAB, WIDTH, COUNT = 300, 24, 200
KEYS: list[Hashable] = [f"row {i}" for i in range(COUNT)]
SPEC = LensSpec(top_k=5, bottom_k=3)


@pytest.fixture(scope="module")
def vectors() -> torch.Tensor:
    return torch.randn(COUNT, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def head() -> LensHead:
    random = torch.Generator().manual_seed(2)
    norm = Norm(torch.randn(WIDTH, generator=random), torch.randn(WIDTH), 1e-5, centred=True)
    unembedding = torch.randn(VOCAB, WIDTH, generator=random)
    return LensHead(
        norm, Unembedding(unembedding), torch.randn(VOCAB), 1.3, chunk_bytes=4 * VOCAB * 3 * ROWS
    )


def projected(cache: RowCache, *arguments: Any) -> ProjectionTable:
    return cache.start_projection(*arguments).table()


def cache_of(head: LensHead, rows: int = 2 * COUNT) -> RowCache:
    cache = RowCache(head, limit=4 * VOCAB * rows, rows=10**6)
    assert cache.usable
    return cache


def targets(count: int, seed: int = 0, each: int = 2) -> torch.Tensor:
    return torch.randint(VOCAB, (count, each), generator=torch.Generator().manual_seed(seed))


def assert_same(ours: ProjectionTable, theirs: ProjectionTable, *, bits: bool) -> None:
    for name, column in vars(theirs).items():
        mine = getattr(ours, name)
        assert mine.dtype == column.dtype, name
        if bits or column.dtype.kind != "f":
            np.testing.assert_array_equal(mine, column, err_msg=name)
        else:
            np.testing.assert_allclose(mine, column, rtol=1e-5, atol=1e-5, err_msg=name)


def some(picked: Sequence[int], named: float) -> list[Hashable]:
    """Return the keys of the picked rows, and None for rows that are not weight rows."""
    random = np.random.default_rng(len(picked))
    return [KEYS[i] if random.random() < named else None for i in picked]


@pytest.mark.parametrize("held", [ROWS, 4 * ROWS + 5, 2 * COUNT])
@pytest.mark.parametrize("named", [0.0, 0.5, 1.0])
def test_the_numbers_are_those_of_the_rows_without_a_cache(
    head: LensHead, vectors: torch.Tensor, named: float, held: int
) -> None:
    cache = cache_of(head, rows=held)
    random = np.random.default_rng(3)
    for turn in range(8):  # rows come again, go, and stand several times in one request
        picked = random.integers(0, COUNT, 1 + turn * 20).tolist()
        wanted = targets(len(picked), turn)
        ours = projected(cache, vectors[picked], some(picked, named), SPEC, wanted)
        assert_same(ours, project(head, vectors[picked], SPEC, wanted), bits=False)


def test_results_are_bit_identical_for_any_earlier_requests(
    head: LensHead, vectors: torch.Tensor
) -> None:
    picked, wanted = list(range(0, 150, 3)), targets(50)
    fresh = projected(cache_of(head), vectors[picked], some(picked, 1.0), SPEC, wanted)
    for before in ([1], list(range(7, 60)), list(range(149, 20, -1)), picked):
        cache = cache_of(head)
        projected(cache, vectors[before], some(before, 1.0), SPEC, targets(len(before)))
        again = projected(cache, vectors[picked], some(picked, 1.0), SPEC, wanted)
        assert_same(again, fresh, bits=True)


def test_a_row_that_is_kept_is_not_computed_again(head: LensHead, vectors: torch.Tensor) -> None:
    cache = cache_of(head)
    first = projected(cache, vectors, KEYS, SPEC, targets(COUNT))
    elsewhere = torch.zeros_like(vectors) + 1
    again = projected(cache, elsewhere, KEYS, SPEC, targets(COUNT))
    assert_same(again, first, bits=True)


def test_another_target_of_a_kept_row_is_exact(head: LensHead, vectors: torch.Tensor) -> None:
    cache = cache_of(head)
    projected(cache, vectors, KEYS, SPEC, targets(COUNT))
    every = torch.arange(VOCAB).expand(COUNT, -1)
    table = projected(cache, vectors, KEYS, SPEC, every)
    logits = head.logits(head.prepare(vectors, SPEC.kind))
    expected = (logits[:, None, :] > logits[:, :, None]).sum(2)
    np.testing.assert_array_equal(table.target_ranks, expected.numpy())


def test_zero_rows_have_no_projection(head: LensHead) -> None:
    table = projected(cache_of(head), torch.zeros(2, WIDTH), ["zero", None], SPEC, targets(2))
    assert table.projected.tolist() == [False, False]


@pytest.mark.parametrize(
    "spec",
    [LensSpec(17, 3), LensSpec(3, 17), LensSpec(5, 5, LensKind.NORMALIZED)],
    ids=str,
)
def test_rows_that_are_not_cached_are_computed(
    head: LensHead, vectors: torch.Tensor, spec: LensSpec
) -> None:
    cache = cache_of(head)
    projected(cache, vectors, KEYS, SPEC, targets(COUNT))
    ours = projected(cache, vectors, KEYS, spec, targets(COUNT))
    assert_same(ours, project(head, vectors, spec, targets(COUNT)), bits=True)


def test_cache_stays_within_its_size(head: LensHead, vectors: torch.Tensor) -> None:
    cache = cache_of(head, rows=3 * ROWS)
    for start in range(0, COUNT, 30):
        part = slice(start, start + 30)
        projected(cache, vectors[part], KEYS[part], SPEC, targets(len(KEYS[part])))
    assert cache._logits.nbytes == 4 * VOCAB * 3 * ROWS
    assert len(cache._slots) <= 3 * ROWS
    assert len(set(cache._slots.values())) == len(cache._slots)


def test_cache_of_size_zero_keeps_no_rows(head: LensHead, vectors: torch.Tensor) -> None:
    cache = RowCache(head, limit=4 * VOCAB - 1, rows=10**6)
    assert not cache.usable
    ours = projected(cache, vectors, KEYS, SPEC, targets(COUNT))
    assert_same(ours, project(head, vectors, SPEC, targets(COUNT)), bits=True)


def test_cache_is_off_if_rows_depend_on_other_rows(head: LensHead) -> None:
    class Unsteady(LensHead):
        def logits(self, prepared: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
            logits = super().logits(prepared, out)
            logits *= 1 + 1e-7 * len(prepared)
            return logits

    assert not RowCache(Unsteady(**vars(head)), limit=10**8, rows=100).usable
    assert RowCache(replace(head), limit=10**8, rows=100).usable


def test_a_projection_that_is_cancelled_keeps_only_finished_rows(
    head: LensHead, vectors: torch.Tensor
) -> None:
    """The check is called before every chunk; later projections get the same bits."""
    cache, calls = cache_of(head), 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RequestCancelled("cancelled")

    with pytest.raises(RequestCancelled):
        projected(cache, vectors, KEYS, SPEC, targets(COUNT), check)
    assert cache.computed == 3 * ROWS  # one chunk: the first check is that of rows without keys
    again = projected(cache, vectors, KEYS, SPEC, targets(COUNT))
    assert_same(again, projected(cache_of(head), vectors, KEYS, SPEC, targets(COUNT)), bits=True)
    assert cache.computed == COUNT


def test_rows_whose_computation_failed_are_computed_again(
    head: LensHead, vectors: torch.Tensor
) -> None:
    """Simulates a device without free memory."""

    class Failing(LensHead):
        def prepare(self, vectors: torch.Tensor, kind: LensKind) -> torch.Tensor:
            if fail and len(vectors):
                raise MemoryError
            return super().prepare(vectors, kind)

    fail = False
    cache = cache_of(Failing(**vars(head)))
    fail = True
    with pytest.raises(MemoryError):
        projected(cache, vectors, KEYS, SPEC, targets(COUNT))
    fail = False
    again = projected(cache, vectors, KEYS, SPEC, targets(COUNT))
    assert_same(again, projected(cache_of(head), vectors, KEYS, SPEC, targets(COUNT)), bits=True)


def pass_over(cache: RowCache, vectors: torch.Tensor, each: int = 20) -> int:
    """Project all rows, a few at once, as the layers of a trace; return how many were found."""
    before = cache.found
    for start in range(0, COUNT, each):
        part = slice(start, start + each)
        projected(cache, vectors[part], KEYS[part], SPEC, targets(each))
    return cache.found - before


def test_repeated_pass_over_rows_that_fit_finds_all_of_them(
    head: LensHead, vectors: torch.Tensor
) -> None:
    cache = cache_of(head, rows=COUNT)
    assert [pass_over(cache, vectors) for _ in range(3)] == [0, COUNT, COUNT]
    assert cache.growth == 0


def test_repeated_pass_over_more_rows_than_fit_finds_those_that_fit(
    head: LensHead, vectors: torch.Tensor
) -> None:
    cache = cache_of(head, rows=160)  # 200 rows are needed
    assert pass_over(cache, vectors) == 0
    assert {pass_over(cache, vectors) for _ in range(30)} == {160}
    assert cache.found + cache.missed == 31 * COUNT


def test_rows_used_repeatedly_replace_those_of_earlier_passes(
    head: LensHead, vectors: torch.Tensor
) -> None:
    cache = cache_of(head, rows=160)
    for _ in range(3):
        pass_over(cache, vectors)
    others: list[Hashable] = [f"other {i}" for i in range(80)]
    for turn in range(12):
        before = cache.found
        for start in range(0, 80, 20):
            part = slice(start, start + 20)
            projected(cache, vectors[part], others[part], SPEC, targets(20, turn))
    assert cache.found - before == 80
