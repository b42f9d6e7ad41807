"""The matrix that turns vectors into logits, as its device multiplies by it fastest."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

# A CPU's core takes at least so many blocks of a product, as others may take more of them; and a
# block has this many tokens: fewer make Python's part count, of more the logits leave the cache.
BLOCKS_EACH = 6
FEWEST_TOKENS, MOST_TOKENS = 1024, 4096
# Token rows in a tile of oneDNN's layouts.
TILE = 64
# Vectors for which the layout is chosen: a layer has this order of them.
ROWS = 128
# What torch's compiler makes of a linear layer; nothing public multiplies by a packed matrix.
_OPERATIONS: Any = torch.ops.mkldnn


@dataclass(frozen=True)
class TokenBlock:
    """The rows of consecutive `tokens`: `matrix` in float32, `packed` for oneDNN or as it is."""

    tokens: slice
    matrix: torch.Tensor
    packed: bool

    def logits(self, prepared: torch.Tensor, out: torch.Tensor) -> None:
        """`prepared` `[n, d_model]` times the block, in `out` `[n, tokens]`."""
        if self.packed:
            out.copy_(_packed_product(prepared, self.matrix))
        else:
            torch.mm(prepared, self.matrix.T, out=out)


class Unembedding:
    """The model's output matrix `[vocab, d_model]`.

    A CPU multiplies by a float32 copy in the layout that oneDNN's kernels read. Without it each
    product of so few rows copies the matrix into such a layout first, and MKL, torch's library
    for float32, is the slower one on some processors besides: together a sixth of a trace's time.
    A GPU multiplies by the matrix itself in float32, as does a CPU for which torch has no oneDNN.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        """From `weight` in any floating type, of which single rows are still read afterwards."""
        self._weight = weight.detach()
        self.vocab, self.d_model = weight.shape
        self.device = weight.device
        self.blocks = tuple(self._blocks())

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """The rows `[..., d_model]` of `tokens` `[...]`, in float32."""
        return self._weight[tokens].float()

    def _blocks(self) -> list[TokenBlock]:
        on_cpu = self.device.type == "cpu"
        packs = on_cpu and has_onednn()
        at_once = tokens_at_once(self.vocab) if on_cpu else self.vocab
        blocks = []
        for start in range(0, self.vocab, at_once):
            tokens = slice(start, min(self.vocab, start + at_once))
            matrix = self._weight[tokens].float()
            if packs:
                matrix = _packed(matrix)
            blocks.append(TokenBlock(tokens, matrix, packs))
        return blocks


def tokens_at_once(vocab: int) -> int:
    """The size of a CPU's blocks: equal shares for the cores that torch uses here."""
    cores = torch.get_num_threads()
    blocks = cores * max(BLOCKS_EACH, math.ceil(vocab / (cores * MOST_TOKENS)))
    return max(FEWEST_TOKENS, math.ceil(vocab / blocks / TILE) * TILE)


@functools.cache
def has_onednn() -> bool:
    """Whether this torch multiplies by packed matrices, which is tried.

    Not all are built so, and the operators are private: a release may change them.
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
