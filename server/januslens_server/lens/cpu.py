"""CPU acceleration of the lens: worker threads, reused buffers, top-k, packed oneDNN products.

Torch splits an operation into equal parts, one per core, and waits for the slowest. Cores are
rarely all free, since messages are encoded and other programs run beside a projection. The lens
therefore computes in pieces of some milliseconds, and each core takes the next piece when it has
finished its last.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def on_free_cores(work: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> list[ResultT]:
    """`work` on every item, on as many cores as torch uses here; the results in the items' order.

    Each item is computed on one core: how many there are does not change a bit of it.
    """
    cores = torch.get_num_threads()
    if cores == 1 or len(items) < 2:
        return [work(item) for item in items]
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def alike(item: ItemT) -> ResultT:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return work(item)

    return list(_pool(cores).map(alike, items))


@functools.cache
def _pool(cores: int) -> ThreadPoolExecutor:
    """A number of threads that each compute one block at a time."""
    pool = ThreadPoolExecutor(cores, "lens")
    every = threading.Barrier(cores)
    list(pool.map(_compute_alone, [every] * cores))
    # What a thread sets for itself torch takes for every thread that begins later.
    torch.set_num_threads(cores)
    return pool


def _compute_alone(every: threading.Barrier) -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # from the first question on it holds for this thread
    every.wait()


class ThreadBuffers(threading.local):
    """Float32 buffers of one thread by name.

    On a CPU the kernel clears every fresh page: for a chunk of logits that takes a sixth of the
    time that it takes to compute them. A GPU's allocator keeps what was freed by itself.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def matrix(self, name: str, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """Uninitialised `[rows, columns]`, valid until this thread asks for the same name again."""
        if device.type != "cpu":
            return torch.empty(rows, columns, device=device)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < rows * columns:
            buffer = self._buffers[name] = torch.empty(rows * columns)
        return buffer[: rows * columns].view(rows, columns)

    def like(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """As `matrix`, of another one's shape and device."""
        return self.matrix(name, matrix.shape[0], matrix.shape[1], matrix.device)


# Entries of which one extreme is kept first: the top k stand in the k blocks with the highest
# ones, so only those are searched. Torch's own `topk` reads every entry with its index.
BLOCK = 64


def highest(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices `[n, count]` of the largest entries of `rows` `[n, width]`, largest first.

    By value, then by lower index: of equal values at the cut those with the lower indices enter.
    """
    return _extremes(rows, count, largest=True)


def lowest(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `highest`, of the smallest entries, smallest first."""
    return _extremes(rows, count, largest=False)


def _extremes(
    rows: torch.Tensor, count: int, *, largest: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    width = rows.shape[1]
    if not count:  # neither `topk` nor a sort returns early
        return rows.new_empty(len(rows), 0), rows.new_empty(len(rows), 0, dtype=torch.long)
    if count >= width:
        return _stable(rows, min(count, width), largest=largest)
    # One more than asked shows whether equal values stand at the cut.
    if 2 * (count + 1) * BLOCK <= width:
        candidates = _candidates(rows, count + 1, largest=largest)
        values, where = rows.gather(1, candidates).topk(count + 1, largest=largest)
        ids = candidates.gather(1, where)
    else:
        values, ids = rows.topk(count + 1, largest=largest)
    tied = (values[:, count - 1] == values[:, count]).nonzero()[:, 0]
    values, ids = _ordered(values[:, :count], ids[:, :count], largest=largest)
    if len(tied):
        values[tied], ids[tied] = _stable(rows[tied], count, largest=largest)
    return values, ids


def _stable(rows: torch.Tensor, count: int, *, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """By sorting whole rows, which keeps the order of equal values."""
    values, ids = rows.sort(dim=1, descending=largest, stable=True)
    return values[:, :count], ids[:, :count]


def _candidates(rows: torch.Tensor, count: int, *, largest: bool) -> torch.Tensor:
    """Indices `[n, candidates]`: the `count` most extreme blocks, and what no block holds."""
    width, device = rows.shape[1], rows.device
    blocks = width // BLOCK
    by_block = rows[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
    ends = by_block.amax(2) if largest else by_block.amin(2)
    chosen = ends.topk(count, largest=largest).indices
    inside = chosen[:, :, None] * BLOCK + torch.arange(BLOCK, device=device)
    rest = torch.arange(blocks * BLOCK, width, device=device).expand(len(rows), -1)
    return torch.cat([inside.flatten(1), rest], dim=1)


def _ordered(
    values: torch.Tensor, ids: torch.Tensor, *, largest: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """By value, then by lower id: `topk` leaves the order among equals open."""
    ids, by_id = ids.sort(dim=1)
    values = values.gather(1, by_id)
    values, by_value = values.sort(dim=1, descending=largest, stable=True)
    return values, ids.gather(1, by_value)


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
        """Pack `weight`, of any floating type; single rows are still read from it afterwards."""
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
