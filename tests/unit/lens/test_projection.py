"""Compare projections with plain formulas, at the limits of rows and chunks and with ties."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from januslens_server.lens import projection
from januslens_server.lens.head import LensHead
from januslens_server.lens.norm import Norm
from januslens_server.lens.projection import project
from januslens_server.lens.unembedding import Unembedding
from januslens_server.results import ProjectionTable
from januslens_server.specs import LensKind, LensSpec

D_MODEL = 16
# Tolerance of a probability in float32, with logits up to about 50.
RESOLUTION = 4e-6
# Less than one block of candidates, one block, a fractional number of blocks, and many blocks.
VOCABULARIES = (1, 3, 64, 129, 700, 5_003)


@dataclass(frozen=True)
class Case:
    """An output head of small integers; its logits are exact in float32, and many are equal."""

    vocab: int
    rows: int = 9
    bias: bool = False
    logit_scale: float = 1.0
    soft_cap: float | None = None
    data_type: torch.dtype = torch.float32

    def head(self, chunk_bytes: int = 2**20) -> LensHead:
        return LensHead(
            final_norm=Norm(torch.ones(D_MODEL), None, 1e-5, centred=False),
            unembedding=Unembedding(self.unembedding()),
            bias=torch.arange(self.vocab).remainder(3).float() if self.bias else None,
            logit_scale=self.logit_scale,
            soft_cap=self.soft_cap,
            chunk_bytes=chunk_bytes,
        )

    def unembedding(self) -> Tensor:
        random = torch.Generator().manual_seed(self.vocab)
        return torch.randint(-2, 3, (self.vocab, D_MODEL), generator=random).float()

    def vectors(self) -> Tensor:
        random = torch.Generator().manual_seed(self.rows)
        vectors = torch.randint(-3, 4, (self.rows, D_MODEL), generator=random)
        return vectors.to(self.data_type)

    def targets(self, count: int) -> Tensor:
        random = torch.Generator().manual_seed(count)
        return torch.randint(self.vocab, (self.rows, count), generator=random)

    def logits(self) -> Tensor:
        """Before the soft-cap, in float64."""
        head = self.head()
        logits = self.vectors().double() @ self.unembedding().double().T
        if head.bias is not None:
            logits = logits + head.bias.double()
        return logits * self.logit_scale

    def capped(self, logits: Tensor) -> Tensor:
        return logits if self.soft_cap is None else self.soft_cap * (logits / self.soft_cap).tanh()


def check(table: ProjectionTable, case: Case, top_k: int, bottom_k: int, targets: Tensor) -> None:
    """Compare everything in the table with the definitions of docs/semantics.md."""
    logits = case.logits()
    probabilities = case.capped(logits).softmax(1)
    check_list(table.top_ids, table.top_logits, table.top_probabilities, case, top_k, largest=True)
    check_list(
        table.bottom_ids,
        table.bottom_logits,
        table.bottom_probabilities,
        case,
        bottom_k,
        largest=False,
    )
    entropy = -torch.special.xlogy(probabilities, probabilities).sum(1) / math.log(2)
    np.testing.assert_allclose(table.entropy_bits, entropy, atol=5e-6)
    larger = logits[:, None, :] > logits.gather(1, targets)[:, :, None]
    assert table.target_ranks.tolist() == larger.sum(2).tolist()
    assert table.target_ids.tolist() == targets.tolist()
    np.testing.assert_allclose(
        table.target_logits, case.capped(logits).gather(1, targets), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(
        table.target_probabilities, probabilities.gather(1, targets), atol=RESOLUTION
    )


def check_list(
    ids: np.ndarray,
    values: np.ndarray,
    probabilities: np.ndarray,
    case: Case,
    count: int,
    *,
    largest: bool,
) -> None:
    """Check that the list has the k extreme values, by value before the cap, then by lower id."""
    logits = case.logits()
    count = min(count, case.vocab)
    sign = -1 if largest else 1
    expected = (sign * logits).sort(dim=1).values[:, :count] * sign
    assert ids.shape == (case.rows, count)
    at = torch.from_numpy(ids)
    assert logits.gather(1, at).tolist() == expected.tolist()
    for row, found in zip((sign * logits).tolist(), ids.tolist(), strict=True):
        assert len(set(found)) == count
        assert [i for _, i in sorted((row[i], i) for i in found)] == found
    np.testing.assert_allclose(values, case.capped(expected), rtol=1e-6, atol=1e-6)
    softmax = case.capped(logits).softmax(1).gather(1, at)
    np.testing.assert_allclose(probabilities, softmax, atol=RESOLUTION)


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("count", [0, 1, 5, 40, 10_000])
def test_every_size_of_vocabulary_and_list(vocab: int, count: int) -> None:
    case = Case(vocab)
    targets = case.targets(2)
    spec = LensSpec(top_k=count, bottom_k=count // 2, kind=LensKind.RAW)
    check(project(case.head(), case.vectors(), spec, targets), case, count, count // 2, targets)


@pytest.mark.parametrize(
    "case",
    [
        Case(700, bias=True),
        Case(700, logit_scale=0.5),
        Case(5_003, soft_cap=30.0),
        Case(700, soft_cap=0.25, bias=True, logit_scale=2.0),  # everything saturates into ties
        Case(700, data_type=torch.bfloat16),
    ],
    ids=str,
)
def test_logit_scale_and_soft_cap_are_applied(case: Case) -> None:
    targets = case.targets(1)
    spec = LensSpec(kind=LensKind.RAW)
    check(project(case.head(), case.vectors(), spec, targets), case, 5, 5, targets)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 5_003 * 3, 2**30])
@pytest.mark.parametrize("cached_bytes", [1, 4 * 5_003 * 2, 2**30])
def test_results_do_not_depend_on_the_chunk_size(
    chunk_bytes: int, cached_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks have one row, several, or all, for the product and for the figures."""
    monkeypatch.setattr(projection, "CACHED_BYTES", cached_bytes)
    case = Case(5_003, rows=11)
    targets = case.targets(3)
    table = project(case.head(chunk_bytes), case.vectors(), LensSpec(kind=LensKind.RAW), targets)
    check(table, case, 5, 5, targets)


@torch.inference_mode()  # as for requests; buffers are shared with other tests of the process
def test_figures_of_a_row_do_not_depend_on_other_rows() -> None:
    """The figures are summed over groups of columns, in the same order for any number of rows."""
    case = Case(20_011, rows=20)
    head, targets = case.head(), case.targets(2)
    logits = projection.compute_logits(head, case.vectors(), LensKind.RAW).clone()
    whole = projection.read_logits(head, logits, LensSpec(), targets)
    for rows in (1, 4, 7, 19):
        part = projection.read_logits(head, logits[:rows], LensSpec(), targets[:rows])
        for name in ("log_normalizer", "entropy_bits", "target_ranks"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[:rows])


def test_no_rows_and_no_targets() -> None:
    case = Case(700, rows=0)
    table = project(case.head(), case.vectors(), LensSpec(top_k=3, bottom_k=0))
    shapes = (table.top_ids.shape, table.bottom_ids.shape, table.target_ids.shape)
    assert shapes == ((0, 3), (0, 0), (0, 0))
    assert table.entropy_bits.shape == table.projected.shape == (0,)


def test_rows_that_are_zero_are_marked() -> None:
    case = Case(700)
    vectors = case.vectors()
    vectors[4] = 0
    table = project(case.head(), vectors, LensSpec())
    assert table.projected.tolist() == [i != 4 for i in range(len(vectors))]


def test_at_most_one_chunk_of_logits_is_in_memory() -> None:
    """This bounds the memory of a request."""
    rows_at_once = []

    class Watched(LensHead):
        def logits(self, prepared: Tensor, out: Tensor | None = None) -> Tensor:
            rows_at_once.append(len(prepared))
            return super().logits(prepared, out)

    case = Case(700, rows=50)
    head = Watched(**vars(case.head(chunk_bytes=4 * 700 * 8)))
    project(head, case.vectors(), LensSpec(kind=LensKind.RAW))
    assert rows_at_once == [8] * 6 + [2]
