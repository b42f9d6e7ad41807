"""The neuron index is computed once, cached, and used only for the same weights and lens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from januslens_server import telemetry
from januslens_server.lens import row_index
from januslens_server.lens.head import LensHead
from januslens_server.lens.projection import Readings, read_vectors
from januslens_server.lens.row_index import RowIndex
from januslens_server.models import neuron_index
from januslens_server.models.loader import load
from januslens_server.models.neuron_index import NeuronIndex
from januslens_server.models.registry import embedded_source
from januslens_server.models.resident import ResidentModel
from januslens_server.models.tensor_cache import DIGEST, TensorCache, Tensors, _digest
from januslens_server.pipelines.find_neurons import read_all_neurons


@pytest.fixture(scope="module")
def demo() -> ResidentModel:
    return load(embedded_source())


@pytest.fixture
def cache(tmp_path: Path) -> TensorCache:
    return TensorCache(tmp_path, limit=10**9)


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after which computing a row fails the test."""

    def refuse(*_: object) -> None:
        raise LookupError("expected the rows from the cache, got them read")

    return lambda: monkeypatch.setattr(neuron_index, "index_rows", refuse)


def read(index: NeuronIndex) -> list[RowIndex]:
    return [index.layer(layer) for layer in range(4)]


def assert_same(ours: list[RowIndex], theirs: list[RowIndex]) -> None:
    for mine, yours in zip(ours, theirs, strict=True):
        for name, column in vars(mine).items():
            assert torch.equal(column, vars(yours)[name]), name


def test_next_server_reads_the_cached_index_unchanged(
    demo: ResidentModel, cache: TensorCache, no_reading: Callable[[], None]
) -> None:
    first = read(NeuronIndex(demo.view, demo.provenance, cache))
    assert_same(first, read(NeuronIndex(demo.view, demo.provenance)))
    no_reading()
    assert_same(first, read(NeuronIndex(demo.view, demo.provenance, cache)))


@pytest.mark.parametrize(
    "change",
    [{"revision": "other"}, {"data_type": "bfloat16"}, {"architecture": "GPTJForCausalLM"}],
    ids=str,
)
def test_index_of_other_weights_is_not_used(
    demo: ResidentModel,
    cache: TensorCache,
    change: dict[str, str],
    no_reading: Callable[[], None],
) -> None:
    NeuronIndex(demo.view, demo.provenance, cache).layer(0)
    no_reading()
    provenance = replace(demo.provenance, **change)  # type: ignore[arg-type]  # of several types
    with pytest.raises(LookupError):
        NeuronIndex(demo.view, provenance, cache).layer(0)


def test_index_of_another_lens_is_not_used(
    demo: ResidentModel, cache: TensorCache, no_reading: Callable[[], None]
) -> None:
    """A local folder's revision is a hash of its weights, without its configuration."""
    NeuronIndex(demo.view, demo.provenance, cache).layer(0)
    no_reading()
    norm = replace(demo.view.lens.final_norm, eps=0.5)
    view = replace(demo.view, lens=replace(demo.view.lens, final_norm=norm))
    with pytest.raises(LookupError):
        NeuronIndex(view, demo.provenance, cache).layer(0)


def of_one_row(found: Tensors) -> Tensors:
    return {name: tensor[:1].clone() for name, tensor in found.items()}


def of_other_keys(found: Tensors) -> Tensors:
    return {f"{name}s": tensor for name, tensor in found.items()}


def with_ids_beyond_the_vocabulary(found: Tensors) -> Tensors:
    return found | {"top_ids": found["top_ids"] + 10**6}


def with_negative_ids(found: Tensors) -> Tensors:
    return found | {"bottom_ids": found["bottom_ids"] - 10**6}


def in_another_type(found: Tensors) -> Tensors:
    return found | {"top_logits": found["top_logits"].bfloat16()}


def with_infinity(found: Tensors) -> Tensors:
    return found | {"log_normalizer": found["log_normalizer"] + float("inf")}


@pytest.mark.parametrize(
    "forged",
    [
        of_one_row,
        of_other_keys,
        with_ids_beyond_the_vocabulary,
        with_negative_ids,
        in_another_type,
        with_infinity,
    ],
    ids=lambda forged: forged.__name__,
)
def test_forged_file_with_a_valid_digest_is_computed_again(
    demo: ResidentModel,
    cache: TensorCache,
    forged: Callable[[Tensors], Tensors],
    caplog: pytest.LogCaptureFixture,
) -> None:
    index = NeuronIndex(demo.view, demo.provenance, cache)
    first = index.layer(0)
    (path,) = cache.folder.iterdir()
    described = index._named(0)
    found = forged(load_file(path))
    kinds = {name: tensor.contiguous() for name, tensor in found.items()}
    digest = _digest(kinds) if forged is not in_another_type else "any"
    save_file(kinds, path, dict(described) | {DIGEST: digest})
    again = NeuronIndex(demo.view, demo.provenance, cache).layer(0)
    assert_same([first], [again])
    assert caplog.text.count(str(path)) == 1
    caplog.clear()
    NeuronIndex(demo.view, demo.provenance, cache).layer(0)  # from the file, written anew
    assert caplog.text == ""


@pytest.fixture
def in_chunks(demo: ResidentModel) -> ResidentModel:
    """The demo, whose layers of 512 neurons are indexed 64 at a time."""
    lens = demo.view.lens
    chunk_bytes = 64 * 4 * lens.unembedding.vocab
    return replace(demo, view=replace(demo.view, lens=replace(lens, chunk_bytes=chunk_bytes)))


def test_cancelled_request_stops_indexing_and_keeps_finished_layers(
    in_chunks: ResidentModel,
) -> None:
    index = NeuronIndex(in_chunks.view, in_chunks.provenance)
    kept = index.layer(0)
    leaving = index.reading(1)
    next(leaving)
    leaving.close()
    assert index.unread(range(4)) == 3
    assert index.layer(0) is kept
    assert len(index.layer(1).top_ids) == 512


def test_requests_taking_turns_compute_each_chunk_once(
    in_chunks: ResidentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them may be cancelled early; results equal those of a single request."""
    chunks = []

    def counting(head: LensHead, vectors: torch.Tensor, *rest: Any) -> Iterator[Readings]:
        chunks.append(len(vectors))
        return read_vectors(head, vectors, *rest)

    alone = NeuronIndex(in_chunks.view, in_chunks.provenance).layer(2)
    monkeypatch.setattr(row_index, "read_vectors", counting)
    index = NeuronIndex(in_chunks.view, in_chunks.provenance)
    leaving, staying = index.reading(2), index.reading(2)
    for _ in range(3):
        next(leaving)
        next(staying)
    assert chunks == [64] * 6
    leaving.close()
    list(staying)
    assert chunks == [64] * 8
    assert_same([index.layer(2)], [alone])
    assert chunks == [64] * 8


def test_indexed_neurons_count_as_projected_vectors(demo: ResidentModel) -> None:
    index = NeuronIndex(demo.view, demo.provenance)
    before = telemetry.VECTORS_PROJECTED._value.get()
    index.layer(0)
    index.layer(0)
    assert telemetry.VECTORS_PROJECTED._value.get() - before == 512


def test_failed_indexing_starts_again(
    in_chunks: ResidentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds while another request waits for the same layer, too."""
    index = NeuronIndex(in_chunks.view, in_chunks.provenance)
    failing, waiting = index.reading(0), index.reading(0)
    next(waiting)
    with monkeypatch.context() as broken:
        broken.setattr(row_index, "read_vectors", lambda *_: _raise(MemoryError()))
        with pytest.raises(MemoryError):
            next(failing)
    list(waiting)
    assert len(index.layer(0).top_ids) == 512


def _raise(error: Exception) -> None:
    raise error


def test_all_layers_can_be_indexed_in_advance(
    demo: ResidentModel, no_reading: Callable[[], None]
) -> None:
    model = replace(demo)  # one that has not been asked anything
    read_all_neurons(model, lambda: None)
    no_reading()
    assert len(read(model.neurons)) == 4


def test_model_with_many_neurons_has_a_shallower_index(
    demo: ResidentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_of_ten = 10 * neuron_index.ENTRY_BYTES * 4 * 512
    monkeypatch.setattr(neuron_index, "INDEX_BYTES", bytes_of_ten)
    index = NeuronIndex(demo.view, demo.provenance)
    assert index.depth == 10
    held = read(index)
    listed = (column for part in held for column in vars(part).values() if column.dim() == 2)
    assert sum(column.nbytes for column in listed) == bytes_of_ten


def test_row_of_zeros_is_not_found(demo: ResidentModel) -> None:
    index = NeuronIndex(demo.view, demo.provenance).layer(0)
    rows = index.listing(719, suppressed=False).rows
    without = replace(index, projected=index.projected.clone())
    without.projected[rows[0]] = False
    assert torch.equal(without.listing(719, suppressed=False).rows, rows[1:])
