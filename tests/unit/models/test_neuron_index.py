"""The index of a model's neurons: read once, found again, and nobody else's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from januslens_server.lens.row_index import RowIndex
from januslens_server.models import neuron_index
from januslens_server.models.loading import load
from januslens_server.models.neuron_index import NeuronIndex
from januslens_server.models.registry import embedded_source
from januslens_server.models.resident import ResidentModel
from januslens_server.models.tensor_cache import TensorCache
from januslens_server.pipelines.find_neurons import read_all_neurons


@pytest.fixture(scope="module")
def demo() -> ResidentModel:
    return load(embedded_source())


@pytest.fixture
def cache(tmp_path: Path) -> TensorCache:
    return TensorCache(tmp_path, limit=10**9)


def refuse() -> None:
    raise LookupError("expected the rows from the cache, got them read")


def read(index: NeuronIndex) -> list[RowIndex]:
    return [index.layer(layer, lambda: None) for layer in range(4)]


def assert_same(ours: list[RowIndex], theirs: list[RowIndex]) -> None:
    for mine, yours in zip(ours, theirs, strict=True):
        for name, column in vars(mine).items():
            assert torch.equal(column, vars(yours)[name]), name


def test_the_next_server_finds_it_as_it_was_read(demo: ResidentModel, cache: TensorCache) -> None:
    first = read(NeuronIndex(demo.view, demo.provenance, cache))
    assert_same(first, read(NeuronIndex(demo.view, demo.provenance)))
    again = NeuronIndex(demo.view, demo.provenance, cache)
    assert_same(first, [again.layer(layer, refuse) for layer in range(4)])


@pytest.mark.parametrize(
    "change",
    [{"revision": "other"}, {"data_type": "bfloat16"}, {"architecture": "GPTJForCausalLM"}],
    ids=str,
)
def test_other_weights_are_read_anew(
    demo: ResidentModel, cache: TensorCache, change: dict[str, str]
) -> None:
    NeuronIndex(demo.view, demo.provenance, cache).layer(0, lambda: None)
    provenance = replace(demo.provenance, **change)  # type: ignore[arg-type]  # of several types
    with pytest.raises(LookupError):
        NeuronIndex(demo.view, provenance, cache).layer(0, refuse)


def test_another_lens_on_the_same_weights_is_read_anew(
    demo: ResidentModel, cache: TensorCache
) -> None:
    """A local folder's revision is a hash of its weights alone, not of its configuration."""
    NeuronIndex(demo.view, demo.provenance, cache).layer(0, lambda: None)
    norm = replace(demo.view.lens.final_norm, eps=0.5)
    view = replace(demo.view, lens=replace(demo.view.lens, final_norm=norm))
    with pytest.raises(LookupError):
        NeuronIndex(view, demo.provenance, cache).layer(0, refuse)


def test_a_caller_who_leaves_stops_the_reading_and_loses_no_layer(demo: ResidentModel) -> None:
    index = NeuronIndex(demo.view, demo.provenance)
    kept = index.layer(0, lambda: None)
    with pytest.raises(LookupError):
        index.layer(1, refuse)
    assert index.layer(0, refuse) is kept
    assert len(index.layer(1, lambda: None).top_ids) == 512


def test_all_neurons_can_be_read_ahead(demo: ResidentModel) -> None:
    model = replace(demo)  # one that has not been asked anything
    read_all_neurons(model)
    assert len([model.neurons.layer(layer, refuse) for layer in range(4)]) == 4


def test_a_model_of_many_neurons_is_indexed_less_deeply(
    demo: ResidentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_of_ten = 10 * neuron_index.ENTRY_BYTES * 4 * 512
    monkeypatch.setattr(neuron_index, "INDEX_BYTES", bytes_of_ten)
    index = NeuronIndex(demo.view, demo.provenance)
    assert index.depth == 10
    held = [index.layer(layer, lambda: None) for layer in range(4)]
    listed = (column for part in held for column in vars(part).values() if column.dim() == 2)
    assert sum(column.nbytes for column in listed) == bytes_of_ten


def test_a_row_of_zeros_is_found_by_no_token(demo: ResidentModel) -> None:
    index = NeuronIndex(demo.view, demo.provenance).layer(0, lambda: None)
    rows = index.listing(719, suppressed=False).rows
    without = replace(index, projected=index.projected.clone())
    without.projected[rows[0]] = False
    assert torch.equal(without.listing(719, suppressed=False).rows, rows[1:])
