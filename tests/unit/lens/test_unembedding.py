"""The output matrix in blocks of tokens, packed or not, of all floating types and sizes."""

from __future__ import annotations

import pytest
import torch

from januslens_server.lens import unembedding
from januslens_server.lens.extremes import highest
from januslens_server.lens.unembedding import (
    FEWEST_TOKENS,
    MOST_TOKENS,
    PRODUCT_BYTES,
    Product,
    Unembedding,
    has_onednn,
    rows_per_product,
    three_parts,
    tokens_at_once,
)
from januslens_server.tuning import MAPPED_BYTES

WIDTH = 24


def weight(vocab: int, data_type: torch.dtype = torch.float32) -> torch.Tensor:
    random = torch.Generator().manual_seed(vocab)
    return torch.randn(vocab, WIDTH, generator=random).to(data_type)


def logits(of: Unembedding, vectors: torch.Tensor) -> torch.Tensor:
    """Compute block by block into one matrix, so rows of a block are not contiguous."""
    out = torch.full((len(vectors), of.vocab), torch.nan)
    for block in of.blocks:
        block.logits(vectors, out[:, block.tokens])
    return out


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "as it is"])
@pytest.mark.parametrize("data_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 65, FEWEST_TOKENS, 2 * FEWEST_TOKENS + 81])
@pytest.mark.parametrize("rows", [0, 1, 2, 97])
def test_logits_are_the_product_in_float64(
    packs: bool, data_type: torch.dtype, vocab: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unembedding, "has_onednn", lambda: packs and has_onednn())
    matrix = weight(vocab, data_type)
    vectors = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))
    of = Unembedding(matrix)
    assert {block.product is Product.PACKED for block in of.blocks} == {packs and has_onednn()}
    wanted = vectors.double() @ matrix.double().T
    assert (logits(of, vectors).double() - wanted).abs().sum() <= 2e-6 * max(1, wanted.numel())


def test_packed_matrix_is_a_copy_and_single_rows_come_from_the_model() -> None:
    matrix = weight(200, torch.float16)
    of = Unembedding(matrix)
    before = logits(of, torch.eye(WIDTH))
    assert before.T.equal(matrix.float())
    tokens = torch.tensor([[3, 199], [0, 3]])
    assert of.rows(tokens).equal(matrix[tokens].float())
    assert (of.vocab, of.d_model, of.device.type) == (200, WIDTH, "cpu")


@pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")
def test_logits_of_a_row_do_not_depend_on_other_rows() -> None:
    """The row cache requires this of each model, and measures it; packed products satisfy it."""
    of = Unembedding(weight(2 * FEWEST_TOKENS))
    vectors = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(2))
    whole = logits(of, vectors)
    for first, last in ((0, 2), (3, 20), (17, 64)):
        assert logits(of, vectors[first:last]).equal(whole[first:last])


@pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")
def test_logits_of_several_products_equal_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    of = Unembedding(weight(FEWEST_TOKENS))
    vectors = torch.randn(97, WIDTH, generator=torch.Generator().manual_seed(3))
    whole = logits(of, vectors)
    monkeypatch.setattr(unembedding, "PRODUCT_BYTES", 20 * 4 * FEWEST_TOKENS)
    assert rows_per_product(len(vectors), FEWEST_TOKENS) == 20
    assert logits(of, vectors).equal(whole)


@pytest.mark.parametrize("rows", [0, 1, 2, 111, 333, 5000])
@pytest.mark.parametrize("tokens", [1, FEWEST_TOKENS, MOST_TOKENS])
def test_products_fit_into_blocks_that_the_heap_reuses(rows: int, tokens: int) -> None:
    at_once = rows_per_product(rows, tokens)
    assert at_once >= 1
    assert 4 * at_once * tokens <= PRODUCT_BYTES < MAPPED_BYTES


@pytest.mark.parametrize("cores", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("vocab", [1, 1000, 5_003, 32_000, 50_257, 262_144])
def test_cores_get_equal_shares_in_blocks_of_some_thousand_tokens(
    cores: int, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    size = tokens_at_once(vocab)
    assert FEWEST_TOKENS <= size <= MOST_TOKENS
    blocks = -(-vocab // size)
    if size > FEWEST_TOKENS:  # full shares, but for what is rounded to the kernels' tiles
        assert 6 * cores - 1 <= blocks
        assert -(-blocks // cores) * cores - blocks <= blocks * 64 / size + 1


def test_logits_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = weight(9_000)
    vectors = torch.randn(103, WIDTH, generator=torch.Generator().manual_seed(3))
    sizes = []
    found = []
    for cores in (1, 3, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda cores=cores: cores)
        of = Unembedding(matrix)
        sizes.append(len(of.blocks))
        found.append(logits(of, vectors))
    assert sizes == [6, 9, 9]
    assert all(each.equal(found[0]) for each in found)


class NoOperators:
    """A torch without oneDNN."""


class OtherArguments:
    """A torch whose operators take other arguments, as in a future release."""

    def _reorder_linear_weight(self) -> None:
        """Fail for any argument."""


class OtherMeaning:
    """A torch whose operators compute something else."""

    def _reorder_linear_weight(self, matrix: torch.Tensor, _rows: int) -> torch.Tensor:
        return matrix

    def _linear_pointwise(self, vectors: torch.Tensor, *_: object) -> torch.Tensor:
        return vectors + 1


@pytest.mark.parametrize("operators", [NoOperators(), OtherArguments(), OtherMeaning()])
def test_changed_private_operators_are_not_used(
    operators: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unembedding, "_OPERATIONS", operators)
    has_onednn.cache_clear()
    try:
        matrix = weight(65)
        of = Unembedding(matrix)
        assert not any(block.product is Product.PACKED for block in of.blocks)
        assert logits(of, torch.eye(WIDTH)).T.equal(matrix)
    finally:
        has_onednn.cache_clear()


def in_parts(vectors: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Multiply as `three_part_product` does, with float32 sums of the same products on the CPU."""
    low, middle, high = (part.float() for part in reversed(three_parts(vectors)))
    columns = matrix.float().T
    return low @ columns + middle @ columns + high @ columns


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_three_bfloat16_parts_are_the_float32_number(scale: float) -> None:
    numbers = scale * torch.randn(10_000, generator=torch.Generator().manual_seed(4))
    parts = three_parts(numbers)
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert torch.stack([part.double() for part in parts]).sum(0).equal(numbers.double())


@pytest.mark.parametrize("width", [24, 576, 4096])
def test_logits_in_parts_have_the_digits_of_float32(width: int) -> None:
    random = torch.Generator().manual_seed(5)
    vectors, matrix = torch.randn(40, width, generator=random), torch.randn(900, width)
    matrix = matrix.bfloat16()
    exact = vectors.double() @ matrix.double().T
    size = vectors.double().abs() @ matrix.double().abs().T
    found = in_parts(vectors, matrix)
    assert ((found.double() - exact).abs() / size).max() <= 1e-6
    one = ((vectors.bfloat16().float() @ matrix.float().T).double() - exact).abs() / size
    assert one.max() > 1e-4  # a single bfloat16 product has other digits
    float32 = (vectors @ matrix.float().T).double() - exact
    assert (found.double() - exact).norm() <= 2 * float32.norm()


def test_parts_keep_the_order_of_logits_and_their_ties() -> None:
    random = torch.Generator().manual_seed(6)
    vectors, matrix = torch.randn(60, 256, generator=random), torch.randn(3_000, 256)
    matrix[2_000:2_300] = matrix[100:400]  # tokens with equal rows
    matrix = matrix.bfloat16()
    found, exact = in_parts(vectors, matrix), vectors.double() @ matrix.double().T
    assert found[:, 2_000:2_300].equal(found[:, 100:400])
    ids = highest(found, 10)[1]
    assert ids.equal(exact.sort(dim=1, descending=True, stable=True).indices[:, :10])
    targets = torch.randint(3_000, (60, 1), generator=random)
    ranks = [(logits > logits.gather(1, targets)).sum(1) for logits in (found, exact)]
    assert ranks[0].equal(ranks[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [24, 4096])
def test_a_gpu_multiplies_by_the_bfloat16_matrix_itself(width: int) -> None:
    random = torch.Generator().manual_seed(7)
    vectors, matrix = torch.randn(130, width, generator=random), torch.randn(2_000, width)
    weight = matrix.bfloat16().cuda()
    of = Unembedding(weight)
    (block,) = of.blocks
    assert block.product is Product.THREE_PARTS
    assert block.matrix.data_ptr() == weight.data_ptr()
    out = torch.empty(130, 2_000, device="cuda")
    block.logits(vectors.cuda(), out)
    exact = vectors.double() @ matrix.bfloat16().double().T
    size = vectors.double().abs() @ matrix.bfloat16().double().abs().T
    assert ((out.cpu().double() - exact).abs() / size).max() <= 1e-6
    again = torch.empty_like(out)
    block.logits(vectors.cuda(), again)
    assert again.equal(out)
