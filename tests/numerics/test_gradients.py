"""Compare factorised gradients with autograd's dense gradients of a plain model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from januslens_server.results import NAMED_KINDS, End, GradientMatrix, MatrixKind, Side
from januslens_server.specs import (
    GradientLensSpec,
    KlDivergence,
    LensKind,
    LensSpec,
    LogitDifference,
    LossSpec,
    NegativeLogLikelihood,
)
from tests.reference.examples import EXAMPLES, Loaded, LoadExample, prompt
from tests.reference.gradients import (
    Factorised,
    Loss,
    dense_gradients,
    kinds_of,
    log_probabilities,
    logit_difference,
    nll,
    run_gradient,
    suppression,
)
from tests.reference.lens import ReadingErrors, read, rows_of

LENGTH = 8
RELATIVE = 1e-5
WRITES_RESIDUAL = {MatrixKind.O, MatrixKind.FF2}
READ_LATER = {MatrixKind.K, MatrixKind.V}
LOSSES = ["nll", "several targets", "logit difference", "kl"]


def factorised(
    loaded: Loaded, ids: Sequence[int], loss: LossSpec, kind: LensKind = LensKind.FINAL_NORM
) -> Factorised:
    spec = GradientLensSpec(
        tuple(ids),
        loss,
        matrices=NAMED_KINDS,
        lens=LensSpec(top_k=6, bottom_k=4, kind=kind),
        components=0,
        include_factors=True,
    )
    return run_gradient(loaded.resident, spec)


def losses(name: str, ids: Sequence[int]) -> tuple[LossSpec, Loss]:
    """Return a loss as in the request, and as a function of a plain model."""
    if name == "nll":
        return NegativeLogLikelihood((7,)), nll(ids, [7])
    if name == "several targets":
        return NegativeLogLikelihood((7, 70, 7)), nll(ids, [7, 70, 7])
    if name == "logit difference":
        return LogitDifference((7,), (8,)), logit_difference(ids, 7, 8)
    return KlDivergence((7, 8, 9)), suppression(ids, [7, 8, 9])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_outer_products_are_the_dense_gradient(
    name: str, loss: str, load_example: LoadExample
) -> None:
    loaded, ids = load_example(name), prompt(name, LENGTH)
    asked, plain = losses(loss, ids)
    found = factorised(loaded, ids, asked)
    dense = dense_gradients(loaded.network, plain)
    assert found.matrices.keys() == dense.keys()
    for key, gradient in dense.items():
        matrix, size = found.matrices[key], float(gradient.norm())
        assert (matrix.d_in, matrix.d_out) == tuple(gradient.shape)
        # A layer that writes nothing gives its other maps a gradient of exactly zero.
        assert (found.outer_products(key) - gradient).norm() <= RELATIVE * size
        assert matrix.frobenius_norm == pytest.approx(size, rel=RELATIVE)
    with torch.no_grad():
        assert found.header.loss == pytest.approx(float(plain(loaded.network)), rel=1e-5)


@pytest.mark.parametrize("name", EXAMPLES)
def test_one_token_prompt(name: str, load_example: LoadExample) -> None:
    """There is a single component; queries and keys of a single position have no gradient."""
    loaded, ids = load_example(name), prompt(name, 1)
    found = factorised(loaded, ids, NegativeLogLikelihood((7,)))
    dense = dense_gradients(loaded.network, nll(ids, [7]))
    for (layer, kind), gradient in dense.items():
        error = (found.outer_products((layer, kind)) - gradient).norm()
        nothing = kind in {MatrixKind.Q, MatrixKind.K}
        assert error <= RELATIVE * dense[layer, MatrixKind.V if nothing else kind].norm()


@pytest.mark.parametrize("loss", ["nll", "several targets"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_components_are_ordered_by_size(name: str, loss: str, load_example: LoadExample) -> None:
    loaded, ids = load_example(name), prompt(name, LENGTH)
    asked, _ = losses(loss, ids)
    run = len(ids) + (2 if loss == "several targets" else 0)
    for matrix in factorised(loaded, ids, asked).matrices.values():
        part = matrix.components
        assert part.inputs is not None
        assert part.vjps is not None
        assert sorted(part.positions.tolist()) == list(range(run))
        np.testing.assert_allclose(part.input_norms, norms(part.inputs), rtol=1e-6)
        np.testing.assert_allclose(part.vjp_norms, norms(part.vjps), rtol=1e-6)
        sizes = (part.input_norms * part.vjp_norms).tolist()
        order = sorted(range(run), key=lambda i: (-sizes[i], part.positions[i]))
        assert order == list(range(run))


def norms(rows: Any) -> Any:
    return np.linalg.norm(rows.astype(np.float64), axis=1)


@pytest.mark.parametrize("name", EXAMPLES)
def test_fewer_components_are_the_largest(name: str, load_example: LoadExample) -> None:
    loaded, ids = load_example(name), prompt(name, LENGTH)
    asked, _ = losses("nll", ids)
    every = factorised(loaded, ids, asked)
    spec = GradientLensSpec(tuple(ids), asked, components=3, layers=(0, 2))
    few = run_gradient(loaded.resident, spec)
    gated = MatrixKind.GATE in kinds_of(loaded.network)
    kinds = [MatrixKind.GATE, MatrixKind.UP] if gated else [MatrixKind.FF1]
    assert list(few.matrices) == [(layer, k) for layer in (2, 0) for k in [*kinds, MatrixKind.FF2]]
    for key, matrix in few.matrices.items():
        whole = every.matrices[key]
        assert matrix.components.positions.tolist() == whole.components.positions[:3].tolist()
        assert matrix.frobenius_norm == whole.frobenius_norm
        assert matrix.components.inputs is None


@pytest.mark.parametrize("name", EXAMPLES)
def test_matrices_come_from_the_last_layer_down(name: str, load_example: LoadExample) -> None:
    loaded, ids = load_example(name), prompt(name, LENGTH)
    found = factorised(loaded, ids, losses("nll", ids)[0])
    layers = [layer for layer, _ in found.matrices]
    assert layers == sorted(layers, reverse=True)
    kinds = kinds_of(loaded.network)
    assert {kind for _, kind in found.matrices} == kinds
    absent = set(NAMED_KINDS) - kinds
    assert set(found.header.skipped) == absent - {MatrixKind.FF1}


@pytest.mark.parametrize("loss", ["nll", "several targets"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_only_the_predicting_positions_reach_the_last_block(
    name: str, loss: str, load_example: LoadExample
) -> None:
    """Keys and values are exceptions, because later positions read them."""
    loaded, ids = load_example(name), prompt(name, LENGTH)
    asked, _ = losses(loss, ids)
    targets = 1 if loss == "nll" else 3
    run = len(ids) + targets - 1
    predicting = set(range(run - targets, run))
    last = loaded.reference.blocks[-1]
    read_by_them = {source for position in predicting for source in last.sources(position)}
    for (layer, kind), matrix in factorised(loaded, ids, asked).matrices.items():
        part = matrix.components
        reached = {int(p) for p, norm in zip(part.positions, part.vjp_norms, strict=True) if norm}
        if layer == 2:
            assert reached == (read_by_them if kind in READ_LATER else predicting)


@pytest.mark.parametrize("kind", LensKind)
@pytest.mark.parametrize("name", EXAMPLES)
def test_projections_of_factors_equal_the_reference(
    name: str, kind: LensKind, load_example: LoadExample
) -> None:
    """Top and bottom tokens, and the ranks of the targets and the prediction, are compared."""
    loaded, ids = load_example(name), prompt(name, LENGTH)
    found = factorised(loaded, ids, losses("several targets", ids)[0], kind)
    with torch.no_grad():
        answer = int(log_probabilities(loaded.network, ids).argmax())
    assert found.header.target_token_ids == (7, 70, 7)
    assert found.header.predicted_token_id == answer
    errors = ReadingErrors()
    for matrix in found.matrices.values():
        assert_sides(matrix)
        part = matrix.components
        vectors = part.vjps if matrix.projected_side is Side.VJP else part.inputs
        assert vectors is not None
        assert part.projections.projected.tolist() == vectors.any(axis=1).tolist()
        rows = np.flatnonzero(part.projections.projected)
        if not len(rows):
            continue
        table = rows_of(part.projections, rows)
        errors.add(read(loaded.reference, torch.from_numpy(vectors[rows]).double(), kind), table)
        assert table.target_ids.tolist() == [[7, 70, 7, answer]] * len(rows)
        assert part.target_ranks[rows].tolist() == table.target_ranks[:, :3].tolist()
        assert part.predicted_ranks[rows].tolist() == table.target_ranks[:, 3].tolist()
    assert errors.rows > 100
    assert errors.logit <= 5e-6
    assert errors.probability <= 1e-6
    assert errors.entropy_bits <= 2e-5


def assert_sides(matrix: GradientMatrix) -> None:
    writes = matrix.kind in WRITES_RESIDUAL
    assert matrix.projected_side is (Side.VJP if writes else Side.INPUT)
    assert matrix.promoted_end is (End.BOTTOM if writes else End.UNSPECIFIED)
    part = matrix.components
    other = part.inputs if writes else part.vjps
    assert other is not None
    for i, row in enumerate(other):
        found, values = part.other_side.indices[i], part.other_side.values[i]
        wanted = sorted(range(len(row)), key=lambda j: (-abs(row[j]), j))[: len(found)]
        assert found.tolist() == wanted
        assert values.tolist() == row[found].tolist()


@pytest.mark.parametrize("name", EXAMPLES)
def test_descent_promotes_tokens_at_the_bottom(name: str, load_example: LoadExample) -> None:
    """After one SGD step on a copy, the last FF2's output is read at the predicting position."""
    loaded, ids, target = load_example(name), prompt(name, LENGTH), 7
    edited = copy.deepcopy(loaded.network)
    before = log_probabilities(edited, ids)[target]
    (-before).backward()
    with torch.no_grad():
        for parameter in edited.parameters():
            parameter.sub_(1e-3 * parameter.grad)
        assert log_probabilities(edited, ids)[target] > before
    found = factorised(loaded, ids, NegativeLogLikelihood((target,)), LensKind.NORMALIZED)
    shift = found.matrices[2, MatrixKind.FF2]
    assert shift.promoted_end is End.BOTTOM
    largest = shift.components
    assert largest.positions[0] == LENGTH - 1
    assert largest.projections.bottom_ids[0, 0] == target
    assert largest.target_ranks[0, 0] == len(loaded.reference.unembedding) - 1


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_step_on_the_factors_alone_promotes_the_target(
    name: str, load_example: LoadExample
) -> None:
    """After `-lr x^T delta` is added to the last FF2, the target is more probable."""
    loaded, ids, target = load_example(name), prompt(name, LENGTH), 7
    found = factorised(loaded, ids, NegativeLogLikelihood((target,)))
    step = found.outer_products((2, MatrixKind.FF2))
    passed = loaded.reference.run(ids)[-1]
    moved = passed.block_output[-1] - 0.5 * passed.neurons[-1] @ step
    before = probability(loaded, passed.block_output[-1], target)
    assert probability(loaded, moved, target) > before


def probability(loaded: Loaded, residual: Tensor, target: int) -> float:
    return float(read(loaded.reference, residual[None]).probabilities[0, target])
