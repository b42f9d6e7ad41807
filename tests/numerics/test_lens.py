"""Compare projections with naive float64 softmaxes and with the model's own logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from januslens_server.lens.head import LensHead
from januslens_server.lens.norm import Norm
from januslens_server.lens.projection import project
from januslens_server.lens.unembedding import Unembedding
from januslens_server.results import NodeKind
from januslens_server.specs import LensKind, LensSpec, ProjectSpec, Selection, TraceSpec
from tests.reference.examples import EXAMPLES, VOCABULARY, Loaded, LoadExample, prompt
from tests.reference.graph import PromptOracle, expected_graph
from tests.reference.lens import ReadingErrors, Readings, read, rows_of, softmax
from tests.reference.traces import Traced, run_project, run_trace

LENGTH = 8
POSITIONS = (3, LENGTH - 1)
SMALL = Selection(heads=2, memory_values_per_head=2, top_neurons=3, bottom_neurons=2)
# Vectors after the final norm are projected by the unembedding only.
TOP = frozenset({NodeKind.FINAL_NORM, NodeKind.PREDICTION})


def traced(loaded: Loaded, ids: Sequence[int], kind: LensKind, target: int | None = None) -> Traced:
    spec = TraceSpec(
        tuple(ids),
        target=None if target is None else (target,),
        positions=POSITIONS,
        selection=SMALL,
        lens=LensSpec(top_k=6, bottom_k=4, kind=kind),
    )
    return run_trace(loaded.resident, spec)


def projected(found: Traced, top: bool) -> dict[str, int]:
    """Return rows by id of the nodes above the final norm (`top`) or below it."""
    return {
        node_id: node.row
        for node_id, node in found.nodes.items()
        if node.row is not None and (node.node.kind in TOP) is top
    }


def model_logits(loaded: Loaded, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = loaded.network(input_ids=torch.tensor([list(ids)])).logits[0]
    return logits.double()


@pytest.mark.parametrize(
    ("kind", "target"),
    [(LensKind.FINAL_NORM, None), (LensKind.NORMALIZED, 7), (LensKind.RAW, 7)],
)
@pytest.mark.parametrize("name", EXAMPLES)
def test_projections_equal_the_reference(
    name: str, kind: LensKind, target: int | None, load_example: LoadExample
) -> None:
    """The vectors are the reference's own, so capture and lens are both checked."""
    loaded, ids = load_example(name), prompt(name, LENGTH)
    found = traced(loaded, ids, kind, target)
    oracle = PromptOracle(loaded.reference, ids)
    expected = expected_graph(oracle, found.header.layers, POSITIONS, SMALL)
    errors = ReadingErrors()
    for top in (False, True):
        rows = projected(found, top)
        vectors = torch.stack([expected.nodes[node_id].vector for node_id in rows])
        readings = read(loaded.reference, vectors, LensKind.RAW if top else kind)
        errors.add(readings, rows_of(found.table, np.array(list(rows.values()))))
    assert errors.rows > 35 * len(POSITIONS) * len(found.header.layers)
    # The tolerance is that of the vectors (test_flow_graph); a test below is stricter.
    assert errors.logit <= 3e-5
    assert errors.probability <= 2e-6
    assert errors.entropy_bits <= 5e-5
    # Ids and ranks that are ordered differently in float64, where float32 cannot distinguish them.
    assert errors.swaps <= errors.rows // 200


@pytest.mark.parametrize("name", EXAMPLES)
def test_targets_are_reported_throughout(name: str, load_example: LoadExample) -> None:
    """The target is the requested token, or the model's own next token at each position."""
    loaded, ids = load_example(name), prompt(name, LENGTH)
    own = model_logits(loaded, ids).argmax(-1).tolist()
    for target, wanted in ((None, own), (7, [7] * LENGTH)):
        found = traced(loaded, ids, LensKind.FINAL_NORM, target)
        shown = found.header.targets
        assert [t.predicted_token_id for t in shown] == [own[p] for p in POSITIONS]
        assert [t.target_token_id for t in shown] == [wanted[p] for p in POSITIONS]
        for node in found.nodes.values():
            if node.row is not None:
                reported = found.table.target_ids[node.row].tolist()
                assert reported == [wanted[node.node.position]]


@pytest.mark.parametrize("name", EXAMPLES)
def test_lens_of_the_last_block_equals_the_models_logits(
    name: str, load_example: LoadExample
) -> None:
    loaded, ids = load_example(name), prompt(name, LENGTH)
    found = traced(loaded, ids, LensKind.FINAL_NORM, target=7)
    logits = model_logits(loaded, ids)
    readings = softmax(logits[list(POSITIONS)])
    last = found.header.layers[-1]
    for ending in (f"L{last}/p%d/BLOCK_OUTPUT", "p%d/FINAL_NORM", "p%d/PREDICTION"):
        rows = [found.nodes[ending % position].row for position in POSITIONS]
        errors = ReadingErrors()
        errors.add(readings, rows_of(found.table, np.array(rows)))
        assert (errors.rows, errors.swaps) == (len(POSITIONS), 0)
        assert errors.logit <= 1e-5
        assert errors.probability <= 2e-6
    for target in found.header.targets:
        at = logits[target.position]
        assert target.target_rank == int((at > at[7]).sum())
        assert target.target_probability == pytest.approx(float(at.softmax(0)[7]), abs=2e-6)


@pytest.mark.parametrize("name", EXAMPLES)
def test_all_logits_of_the_last_block_equal_the_models(
    name: str, load_example: LoadExample
) -> None:
    """All logits are compared, not only those in the lists."""
    loaded, ids = load_example(name), prompt(name, LENGTH)
    lens = LensSpec(top_k=VOCABULARY, bottom_k=0)
    spec = TraceSpec(tuple(ids), lens=lens, node_kinds=frozenset({NodeKind.BLOCK_OUTPUT}))
    found = run_trace(loaded.resident, spec)
    row = found.nodes[f"L{found.header.layers[-1]}/p{LENGTH - 1}/BLOCK_OUTPUT"].row
    assert row is not None
    logits = torch.empty(VOCABULARY)
    logits[torch.from_numpy(found.table.top_ids[row])] = torch.from_numpy(
        found.table.top_logits[row]
    )
    wanted = model_logits(loaded, ids)[-1]
    torch.testing.assert_close(
        logits.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max())
    )


@pytest.mark.parametrize("kind", LensKind)
@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama"])
def test_own_vectors_from_tiny_to_large(
    name: str, kind: LensKind, load_example: LoadExample
) -> None:
    """Sizes range from VJPs near the norm's epsilon to late residuals; zeros are not projected."""
    loaded = load_example(name)
    width = loaded.reference.unembedding.shape[1]
    random = torch.Generator().manual_seed(0)
    scales = torch.tensor([1e-8, 1e-5, 1e-3, 0.03, 1.0, 30.0, 1e3])
    vectors = torch.randn(len(scales), width, generator=random) * scales[:, None]
    vectors = torch.cat([vectors, torch.zeros(1, width)])
    spec = ProjectSpec(vectors.numpy(), LensSpec(top_k=6, bottom_k=4, kind=kind), target=(7,))
    table = run_project(loaded.resident, spec)
    assert table.projected.tolist() == [True] * len(scales) + [False]
    errors = ReadingErrors()
    rows = np.arange(len(scales))
    errors.add(read(loaded.reference, vectors[:-1].double(), kind), rows_of(table, rows))
    assert errors.logit <= 2e-6
    assert errors.probability <= 1e-6
    assert errors.entropy_bits <= 2e-5


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 5.0, 50.0])
def test_entropy_over_a_wide_vocabulary(spread: float) -> None:
    """Rounding errors must not add up: near a uniform distribution all terms round alike."""
    random = torch.Generator().manual_seed(0)
    unembedding = torch.randn(50_257, 8, generator=random) * spread
    vectors = torch.randn(5, 8, generator=random)
    norm = Norm(torch.ones(8), None, 1e-5, centred=False)
    table = project(LensHead(norm, Unembedding(unembedding)), vectors, LensSpec(kind=LensKind.RAW))
    wanted = softmax(vectors.double() @ unembedding.double().T).entropy_bits
    assert np.abs(table.entropy_bits - wanted.numpy()).max() <= 5e-5


def test_peaked_distribution_has_zero_entropy_and_no_nan(load_example: LoadExample) -> None:
    """Probabilities that underflow to 0 contribute 0 log 0 = 0."""
    loaded = load_example("gpt2")
    direction = loaded.reference.unembedding[[7]].float() * 1e4
    spec = ProjectSpec(direction.numpy(), LensSpec(kind=LensKind.RAW), target=(8,))
    table = run_project(loaded.resident, spec)
    assert table.top_ids[0, 0] == 7
    assert table.entropy_bits[0] == pytest.approx(0.0, abs=1e-6)
    assert table.bottom_probabilities[0].tolist() == [0.0] * 5
    readings: Readings = read(loaded.reference, direction.double(), LensKind.RAW)
    # Ranks come from logits, because underflowed probabilities would all be equal.
    assert table.target_ranks[0, 0] == int((readings.logits[0] > readings.logits[0, 8]).sum())
