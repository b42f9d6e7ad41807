"""Index of the tokens that a model's MLP neurons promote, computed once per model."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from functools import partial
from weakref import WeakValueDictionary

import torch

from januslens_server import telemetry
from januslens_server.lens.row_index import RowIndex, index_rows
from januslens_server.models.experts import Experts
from januslens_server.models.tensor_cache import TensorCache
from januslens_server.models.views import Block, ModelView
from januslens_server.results import Provenance

# Tokens stored for each end of a neuron's projection, and the maximum bytes of a model's index.
DEPTH = 64
INDEX_BYTES = 512 * 2**20
# Bytes of an id and a logit at either end.
ENTRY_BYTES = 16
# Bytes of a neuron's log normaliser, its entropy, the rank of its last token, and whether it was
# projected.
ROW_BYTES = 13
# Upper bound of the bytes of a cache file beside its tensors.
HEADER_BYTES = 2**16

# Change this whenever the computed values change.
VERSION = "2"


class NeuronIndex:
    """Projections of the value rows (FF2) of every layer, experts included.

    A layer is computed when it is first needed. Not safe for concurrent use by several threads.
    """

    def __init__(
        self, view: ModelView, provenance: Provenance, cache: TensorCache | None = None
    ) -> None:
        """Create an empty index. Layers of the same weights in `cache` are not computed again."""
        self._view = view
        self._about = _description(view, provenance)
        self._cache = cache
        self._layers: dict[int, RowIndex] = {}
        self._underway: WeakValueDictionary[int, Iterator[None]] = WeakValueDictionary()

    @property
    def depth(self) -> int:
        """Number of tokens stored for each end."""
        return _depth(self._view)

    def unread(self, layers: Iterable[int]) -> int:
        """Number of the layers that have not been computed yet."""
        return sum(layer not in self._layers for layer in layers)

    def layer(self, layer: int) -> RowIndex:
        """Index of one layer's rows in order; in a mixture, expert by expert."""
        for _ in self.reading(layer):
            pass
        return self._layers[layer]

    def reading(self, layer: int) -> Generator[None]:
        """Compute a layer unless it is known, and yield after each chunk.

        Requests that take turns share the work: each chunk is computed once. If all of them are
        closed before the end, their chunks are discarded.
        """
        while layer not in self._layers:
            reading = self._underway.get(layer)
            if reading is None:
                reading = self._underway[layer] = self._read(layer)
            next(reading, None)
            yield

    def _kept(self, layer: int) -> RowIndex | None:
        if self._cache is None:
            return None
        rows = sum(len(matrix) for matrix in _value_rows(self._view.parts(layer)))
        largest = rows * (ENTRY_BYTES * self.depth + ROW_BYTES) + HEADER_BYTES
        check = partial(_check, rows, self.depth, self._view.facts.vocab_size)
        tensors = self._cache.read(self._named(layer), largest, check)
        return None if tensors is None else RowIndex(**tensors)

    def _read(self, layer: int) -> Iterator[None]:
        """Read a layer from the cache at once, or compute it chunk by chunk."""
        try:
            index = self._kept(layer)
            if index is None:
                matrices = _value_rows(self._view.parts(layer))
                index = yield from index_rows(self._view.lens, matrices, self.depth)
                telemetry.VECTORS_PROJECTED.inc(len(index.projected))
                if self._cache is not None:
                    self._cache.write(self._named(layer), dict(vars(index)))
            self._layers[layer] = index
        finally:
            self._underway.pop(layer, None)  # after a failure, start again

    def _named(self, layer: int) -> Mapping[str, str]:
        return self._about | {"layer": str(layer), "depth": str(self.depth)}


def _check(rows: int, depth: int, vocab: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `ValueError` unless the tensors are an index of this many rows."""
    expected = {
        "projected": (torch.bool, (rows,)),
        "top_ids": (torch.int32, (rows, depth)),
        "top_logits": (torch.float32, (rows, depth)),
        "bottom_ids": (torch.int32, (rows, depth)),
        "bottom_logits": (torch.float32, (rows, depth)),
        "bottom_ranks": (torch.int32, (rows,)),
        "log_normalizer": (torch.float32, (rows,)),
        "entropy_bits": (torch.float32, (rows,)),
    }
    if tensors.keys() != expected.keys():
        raise ValueError(f"it has tensors {sorted(tensors)}: expected {sorted(expected)}")
    for name, (kind, shape) in expected.items():
        found = tensors[name]
        if found.dtype is not kind or found.shape != shape:
            raise ValueError(
                f"{name} is {found.dtype} {list(found.shape)}: expected {kind} {list(shape)}"
            )
        if kind is torch.int32 and bool(((found < 0) | (found >= vocab)).any()):
            raise ValueError(f"{name} is out of range: expected 0 to {vocab - 1}")
        if kind is torch.float32 and not bool(found[tensors["projected"]].isfinite().all()):
            raise ValueError(f"{name} is infinite or NaN")


def _depth(view: ModelView) -> int:
    """Number of tokens per end: `DEPTH`, or fewer to keep a large model within `INDEX_BYTES`."""
    neurons = max(1, view.facts.n_layers * view.n_neurons)
    fitting = INDEX_BYTES // (ENTRY_BYTES * neurons)
    return min(DEPTH, view.facts.vocab_size, max(1, fitting))


def _value_rows(block: Block) -> Iterator[torch.Tensor]:
    """Yield what neurons write `[d_mlp, d_model]`; in a mixture, for each expert."""
    if isinstance(block.mlp, Experts):
        yield from block.mlp.value_rows()
    elif block.mlp is not None:
        yield block.mlp.ff2.weight


def _description(view: ModelView, provenance: Provenance) -> dict[str, str]:
    """Describe what the values depend on: the weights and settings of the configuration."""
    lens = view.lens
    norm = f"centred={lens.final_norm.centred} eps={lens.final_norm.eps}"
    return {
        "holds": "neuron index",
        "version": VERSION,
        "revision": provenance.revision,
        "architecture": provenance.architecture,
        "data_type": provenance.data_type,
        "lens": f"{norm} scale={lens.logit_scale} cap={lens.soft_cap}",
    }
