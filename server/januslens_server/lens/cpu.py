"""CPU acceleration of the lens: worker threads, reused buffers, top-k, packed oneDNN products.

Torch splits an operation into equal parts, one per core, and waits for the slowest. Often some
cores are busy, because messages are encoded or other programs run at the same time. So the lens
computes in pieces of some milliseconds, and each core takes the next piece when it has finished
one.
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
    """Call `work` with every item on torch's number of cores; return the results in order.

    Each item is computed on one core, so the number of cores does not change the results.
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
    """Return a pool of threads, each of which computes on one core."""
    pool = ThreadPoolExecutor(cores, "lens")
    every = threading.Barrier(cores)
    list(pool.map(_compute_alone, [every] * cores))
    # Threads inherit the last number that any thread has set, so restore it for later threads.
    torch.set_num_threads(cores)
    return pool


def _compute_alone(every: threading.Barrier) -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # torch applies the setting to this thread on the first call
    every.wait()


class ThreadBuffers(threading.local):
    """Reusable float32 buffers of one thread, by name.

    On a CPU, the kernel clears every new page. For a chunk of logits, this takes a sixth of the
    time of computing them. On a GPU, torch's own allocator reuses freed memory.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def matrix(self, name: str, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """Return an uninitialised matrix, valid until this thread requests the same name again."""
        if device.type != "cpu":
            return torch.empty(rows, columns, device=device)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < rows * columns:
            buffer = self._buffers[name] = torch.empty(rows * columns)
        return buffer[: rows * columns].view(rows, columns)

    def like(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """Return a buffer as `matrix` does, with the shape and device of another matrix."""
        return self.matrix(name, matrix.shape[0], matrix.shape[1], matrix.device)


# Number of entries in a block. The largest k entries are in the k blocks with the largest maxima,
# so only those blocks are searched. Torch's own `topk` reads every entry together with its index.
BLOCK = 64


def highest(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values and indices `[n, count]` of the largest entries of each row, largest first.

    Equal values are ordered by index; if they tie for the last place, the lowest indices are taken.
    """
    return _extremes(rows, count, largest=True)


def lowest(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest entries as `highest` does, smallest first."""
    return _extremes(rows, count, largest=False)


def _extremes(
    rows: torch.Tensor, count: int, *, largest: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    width = rows.shape[1]
    if not count:  # `topk` and sorting would read all entries
        return rows.new_empty(len(rows), 0), rows.new_empty(len(rows), 0, dtype=torch.long)
    if count >= width:
        return _stable(rows, min(count, width), largest=largest)
    # One entry more shows whether equal values tie for the last place.
    if 2 * (count + 1) * BLOCK <= width:
        candidates = _candidates(rows, count + 1, largest=largest)
        values, where = rows.gather(1, candidates).topk(count + 1, largest=largest)
        ids = candidates.gather(1, where)
    else:
        values, ids = rows.topk(count + 1, largest=largest)
    tied = (values[:, count - 1] == values[:, count]).nonzero()[:, 0]
    values, ids = _ordered(values[:, :count], ids[:, :count], largest=largest)
    for i in tied.tolist():
        values[i], ids[i] = _lowest_of_tied(rows[i], values[i], ids[i])
    return values, ids


def _lowest_of_tied(
    row: torch.Tensor, values: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return extremes of a row whose last value occurs more often, with its lowest indices.

    There is no sort of the row: all logits of a vector of zeros are equal, and such vectors are
    frequent among gradients.
    """
    clear = ids[values != values[-1]]
    tied = (row == values[-1]).nonzero()[: len(ids) - len(clear), 0]
    ids = torch.cat([clear, tied])
    return row[ids], ids


def _stable(rows: torch.Tensor, count: int, *, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the extremes by sorting whole rows, which keeps the order of equal values."""
    values, ids = rows.sort(dim=1, descending=largest, stable=True)
    return values[:, :count], ids[:, :count]


def _candidates(rows: torch.Tensor, count: int, *, largest: bool) -> torch.Tensor:
    """Return the indices in the `count` most extreme blocks, and those after the last block."""
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
    """Sort by value, then by id; `topk` does not define the order of equal values."""
    ids, by_id = ids.sort(dim=1)
    values = values.gather(1, by_id)
    values, by_value = values.sort(dim=1, descending=largest, stable=True)
    return values, ids.gather(1, by_value)


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


@dataclass(frozen=True)
class TokenBlock:
    """The unembedding of consecutive `tokens` in float32, `packed` in oneDNN's layout or not."""

    tokens: slice
    matrix: torch.Tensor
    packed: bool

    def logits(self, prepared: torch.Tensor, out: torch.Tensor) -> None:
        """Write the logits of `prepared` `[n, d_model]` to `out` `[n, tokens]`."""
        if not self.packed:
            torch.mm(prepared, self.matrix.T, out=out)
            return
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
    That takes a sixth of a trace's time. On a GPU, or if torch was built without oneDNN, the matrix
    is used in float32 without packing.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        """Pack `weight`, of any floating type. `rows` reads from `weight` itself, so keep it."""
        self._weight = weight.detach()
        self.vocab, self.d_model = weight.shape
        self.device = weight.device
        self.blocks = tuple(self._blocks())

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the rows `[..., d_model]` of `tokens` `[...]` in float32."""
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
