"""The model's output matrix, in the form that the device multiplies by fastest."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

# Blocks per core, at least, so that idle cores can take over work of busy ones. The number of
# tokens in a block is between two bounds: below them Python's overhead counts, above them a product
# has few rows.
BLOCKS_EACH = 6
FEWEST_TOKENS, MOST_TOKENS = 1024, 2048
# Maximum bytes of one product. OneDNN allocates its result: below `tuning.MAPPED_BYTES` the memory
# is reused, above it the system clears every page of every product. It also fits into the cache
# from which the product is copied.
PRODUCT_BYTES = 15 * 2**16
# Number of token rows in a tile of oneDNN's layout.
TILE = 64
# Number of vectors that oneDNN chooses its layout for, about that of a layer.
ROWS = 128
# Private operators, used by torch's compiler: no public function multiplies by a packed matrix.
_OPERATIONS: Any = torch.ops.mkldnn


class Product(Enum):
    """How logits are computed: each kind gives sums of exact float32 products."""

    FLOAT32 = "float32 matrix"
    PACKED = "float32 matrix in oneDNN's layout"
    THREE_PARTS = "bfloat16 matrix, by three bfloat16 parts of each vector"


@dataclass(frozen=True)
class TokenBlock:
    """The unembedding of consecutive `tokens`, in the form that `product` multiplies by."""

    tokens: slice
    matrix: torch.Tensor
    product: Product

    def logits(self, prepared: torch.Tensor, out: torch.Tensor) -> None:
        """Write the logits of `prepared` `[n, d_model]` in float32 to `out` `[n, tokens]`."""
        if self.product is Product.FLOAT32:
            torch.mm(prepared, self.matrix.T, out=out)
        elif self.product is Product.THREE_PARTS:
            three_part_product(prepared, self.matrix, out)
        else:
            self._packed_logits(prepared, out)

    def _packed_logits(self, prepared: torch.Tensor, out: torch.Tensor) -> None:
        rows = rows_per_product(len(prepared), out.shape[1])
        if rows == len(prepared):  # few rows: splitting takes as long as copying
            out.copy_(_packed_product(prepared, self.matrix))
            return
        for vectors, logits in zip(prepared.split(rows), out.split(rows), strict=True):
            logits.copy_(_packed_product(vectors, self.matrix))


class Unembedding:
    """The model's output matrix `[vocab, d_model]`.

    On a CPU, products use a float32 copy in the layout of oneDNN's kernels. Otherwise each product
    would first copy the matrix to another layout, and use MKL, which is slower on some processors.
    That takes a sixth of a trace's time. A GPU multiplies by a bfloat16 matrix itself, without a
    copy. Of other types, or if torch lacks the operators, a float32 copy is used.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        """Prepare `weight`, of any floating type. `rows` reads from `weight`, so keep it."""
        self._weight = weight.detach()
        self.vocab, self.d_model = weight.shape
        self.device = weight.device
        self.blocks = tuple(self._blocks())

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the rows `[..., d_model]` of `tokens` `[...]` in float32."""
        return self._weight[tokens].float()

    def _blocks(self) -> list[TokenBlock]:
        if multiplies_without_copy(self.device, self._weight.dtype):
            return [TokenBlock(slice(0, self.vocab), self._weight, Product.THREE_PARTS)]
        on_cpu = self.device.type == "cpu"
        product = Product.PACKED if on_cpu and has_onednn() else Product.FLOAT32
        at_once = tokens_at_once(self.vocab) if on_cpu else self.vocab
        blocks = []
        for start in range(0, self.vocab, at_once):
            tokens = slice(start, min(self.vocab, start + at_once))
            matrix = self._weight[tokens].float()
            if product is Product.PACKED:
                matrix = _packed(matrix)
            blocks.append(TokenBlock(tokens, matrix, product))
        return blocks


def three_parts(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split float32 numbers into three bfloat16 ones, largest first, whose sum they are.

    Each has 8 of the 24 bits of the significand. The sum is exact unless a number is below 1e-33.
    """
    high = vectors.bfloat16()
    rest = vectors - high.float()
    middle = rest.bfloat16()
    return high, middle, (rest - middle.float()).bfloat16()


def three_part_product(prepared: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor) -> None:
    """Write `prepared matrix^T` to `out` `[n, vocab]`; `matrix` is `[vocab, d_model]` in bfloat16.

    Products of two bfloat16 numbers are exact in float32, in which the tensor cores add them. The
    smallest part comes first, so that its digits are not lost.
    """
    high, middle, low = three_parts(prepared)
    torch.mm(low, matrix.T, torch.float32, out=out)
    for part in (middle, high):
        torch.addmm(out, part, matrix.T, torch.float32, out=out)


def multiplies_without_copy(device: torch.device, data_type: torch.dtype) -> bool:
    """Whether products use a weight of this type on this device as it is, by three parts."""
    return data_type is torch.bfloat16 and device.type == "cuda" and has_float32_sums(device)


@functools.cache
def has_float32_sums(device: torch.device) -> bool:
    """Whether torch multiplies bfloat16 matrices with a float32 result there, found by trying."""
    try:
        vectors = 1 + torch.arange(1.0, 65.0, device=device).reshape(4, 16) * 2**-20
        matrix = torch.eye(16, dtype=torch.bfloat16, device=device)
        product = torch.empty(4, 16, device=device)
        three_part_product(vectors, matrix, product)
    # Builds without CUDA raise AssertionError; builds without `out_dtype`, TypeError; devices and
    # kernels that lack the product, one of the others.
    except (AssertionError, NotImplementedError, RuntimeError, TypeError):
        return False
    return torch.equal(product, vectors)


def tokens_at_once(vocab: int) -> int:
    """Return the number of tokens per block on a CPU, with equal shares for torch's cores."""
    cores = torch.get_num_threads()
    blocks = cores * max(BLOCKS_EACH, math.ceil(vocab / (cores * MOST_TOKENS)))
    return max(FEWEST_TOKENS, math.ceil(vocab / blocks / TILE) * TILE)


def rows_per_product(rows: int, tokens: int) -> int:
    """Return the rows of each of the fewest equal parts with at most `PRODUCT_BYTES` of logits."""
    parts = math.ceil(rows * tokens * 4 / PRODUCT_BYTES)
    return math.ceil(rows / parts) if parts else 1


@functools.cache
def has_onednn() -> bool:
    """Whether torch can multiply by packed matrices, found out by trying.

    Some builds of torch lack oneDNN, and a release may change the private operators.
    """
    matrix, vectors = torch.eye(TILE), torch.arange(2.0 * TILE).reshape(2, TILE)
    try:
        product = _packed_product(vectors, _packed(matrix))
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(product, vectors)


def _packed(matrix: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = _OPERATIONS._reorder_linear_weight(matrix, ROWS)  # noqa: SLF001 - above
    return packed


def _packed_product(vectors: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = _OPERATIONS._linear_pointwise(  # noqa: SLF001 - above
        vectors, packed, None, "none", [], ""
    )
    return product
