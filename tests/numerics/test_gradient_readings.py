"""Compare spectrum, neuron changes, segments and verify with dense gradients of a plain model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from januslens_server.errors import InvalidRequest
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.resolve import resolve_gradient_lens
from januslens_server.results import NAMED_KINDS, GradientMatrix, GradientSummary, MatrixKind
from januslens_server.specs import GradientLensSpec, LensKind, LensSpec, NegativeLogLikelihood, Span
from tests.reference.examples import EXAMPLES, LoadExample, prompt
from tests.reference.model import ReferenceModel

TARGET = 17


def ask(
    resident: ResidentModel, spec: GradientLensSpec
) -> tuple[list[GradientMatrix], GradientSummary]:
    events = list(gradient_lens(resolve_gradient_lens(resident, spec), lambda: None))
    matrices = [event for event in events if isinstance(event, GradientMatrix)]
    summary = events[-1]
    assert isinstance(summary, GradientSummary)
    return matrices, summary


def mlp_gradients(network: Any, ids: list[int], layer: int) -> dict[MatrixKind, Tensor]:
    """Dense dL/dW `[d_in, d_out]` of one MLP, by autograd on the parameters."""
    network.zero_grad()
    (-network(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[TARGET]).backward()
    body = getattr(network, "transformer", None)
    mlp = network.model.layers[layer].mlp if body is None else body.h[layer].mlp
    names = {
        MatrixKind.FF1: ("c_fc", "fc_in"),
        MatrixKind.GATE: ("gate_proj",),
        MatrixKind.UP: ("up_proj",),
        MatrixKind.FF2: ("c_proj", "down_proj", "fc_out"),
    }
    gradients = {}
    for kind, candidates in names.items():
        for name in candidates:
            if hasattr(mlp, name):
                module = getattr(mlp, name)
                grad = module.weight.grad.clone()
                gradients[kind] = grad.T if isinstance(module, nn.Linear) else grad
    network.zero_grad()
    return gradients


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_spectrum_is_numpys_svd_of_the_dense_gradient(name: str, load_example: LoadExample) -> None:
    loaded = load_example(name)
    ids = prompt(name, 6)
    spec = GradientLensSpec(
        tuple(ids),
        NegativeLogLikelihood((TARGET,)),
        layers=(1,),
        lens=LensSpec(3, 3, LensKind.NORMALIZED),
        spectrum_rank=4,
    )
    matrices, _ = ask(loaded.resident, spec)
    gradients = mlp_gradients(loaded.network, ids, layer=1)
    assert {matrix.kind for matrix in matrices} == set(gradients)
    for matrix in matrices:
        dense = gradients[matrix.kind].double().numpy()
        left, values, right = np.linalg.svd(dense, full_matrices=False)
        found = matrix.spectrum
        assert found is not None
        np.testing.assert_allclose(found.values, values[:4], rtol=1e-4)
        explained = values[:4] ** 2 / (values**2).sum()
        np.testing.assert_allclose(found.explained, explained, rtol=1e-4)
        assert matrix.frobenius_norm == pytest.approx(np.linalg.norm(dense), rel=1e-5)
        residual, other = (right, left.T) if matrix.kind is MatrixKind.FF2 else (left.T, right)
        for i in range(2):
            assert_singular(loaded.reference, matrix, i, residual[i], other[i])


def assert_singular(
    reference: ReferenceModel,
    matrix: GradientMatrix,
    i: int,
    residual: np.ndarray[Any, Any],
    other: np.ndarray[Any, Any],
) -> None:
    """Compare a singular pair up to its common sign, which the entries of one side determine."""
    found = matrix.spectrum
    assert found is not None
    indices, entries = found.other_side.indices[i], found.other_side.values[i]
    sign = np.sign(entries[0] * other[indices[0]])
    np.testing.assert_allclose(entries, sign * other[indices], atol=1e-5)
    vector = torch.from_numpy(sign * residual)
    normed = reference.final_norm(vector / vector.norm())
    logits = normed @ reference.unembedding.T
    if reference.head_bias is not None:
        logits = logits + reference.head_bias
    assert found.projections.top_ids[i].tolist() == logits.topk(3).indices.tolist()
    assert (
        found.projections.bottom_ids[i].tolist() == logits.topk(3, largest=False).indices.tolist()
    )


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_neuron_changes_are_columns_and_rows_of_the_dense_gradient(
    name: str, load_example: LoadExample
) -> None:
    loaded = load_example(name)
    ids, rate = prompt(name, 6), 0.7
    spec = GradientLensSpec(
        tuple(ids),
        NegativeLogLikelihood((TARGET,)),
        layers=(1,),
        lens=LensSpec(5, 0, LensKind.RAW),
        neurons=4,
        learning_rate=rate,
    )
    matrices, _ = ask(loaded.resident, spec)
    gradients = mlp_gradients(loaded.network, ids, layer=1)
    unembedding, bias = loaded.reference.unembedding, loaded.reference.head_bias
    for matrix in matrices:
        dense = gradients[matrix.kind].double()
        rows = dense if matrix.kind is MatrixKind.FF2 else dense.T
        expected = rows.norm(dim=1).sort(descending=True)
        found = matrix.neurons
        assert found is not None
        assert found.neurons.tolist() == expected.indices[:4].tolist()
        np.testing.assert_allclose(found.change_norms, rate * expected.values[:4], rtol=1e-4)
        change = -rate * rows[found.neurons]
        logits = change @ unembedding.T + (0 if bias is None else bias)
        assert found.change.top_ids.tolist() == logits.topk(5).indices.tolist()
        assert found.after is not None
        # RAW is linear: before + change = after, up to the bias, which each projection contains
        # once.
        before, moved, after = (
            table.target_logits[:, 0] for table in (found.before, found.change, found.after)
        )
        constant = 0 if bias is None else bias[TARGET].item()
        np.testing.assert_allclose(before + moved, after + constant, atol=1e-4)


def test_without_a_learning_rate_only_the_change_is_shown(load_example: LoadExample) -> None:
    spec = GradientLensSpec((1, 2, 3), NegativeLogLikelihood((TARGET,)), layers=(0,), neurons=2)
    matrices, _ = ask(load_example("gpt2").resident, spec)
    for matrix in matrices:
        assert matrix.neurons is not None
        assert matrix.neurons.after is None


def test_segments_average_over_their_positions(load_example: LoadExample) -> None:
    loaded = load_example("gpt2")
    ids = prompt("gpt2", 8)
    spec = GradientLensSpec(
        tuple(ids),
        NegativeLogLikelihood((TARGET,)),
        components=0,
        subject=Span(2, 5),
        lens=LensSpec(1, 1),
    )
    matrices, summary = ask(loaded.resident, spec)
    expected = {
        "first_token": [0],
        "subject": [2, 3],
        "last_subject_token": [4],
        "rest": [1, 5, 6],
        "last_token": [7],
    }
    rows = {(row.segment, row.layer, row.kind): row for row in summary.segments}
    assert len(rows) == len(expected) * len(matrices)
    for matrix in matrices:
        parts = matrix.components
        norm_at = dict(zip(parts.positions.tolist(), parts.vjp_norms.tolist(), strict=True))
        rank_at = {
            position: rank
            for position, rank, projected in zip(
                parts.positions.tolist(),
                parts.target_ranks[:, 0].tolist(),
                parts.projections.projected.tolist(),
                strict=True,
            )
            if projected
        }
        for segment, positions in expected.items():
            row = rows[segment, matrix.layer, matrix.kind]
            ranks = [rank_at[p] for p in positions if p in rank_at]
            assert row.positions == len(positions)
            assert row.mean_vjp_norm == pytest.approx(np.mean([norm_at[p] for p in positions]))
            assert row.mean_target_rank == (pytest.approx(np.mean(ranks)) if ranks else None)


@pytest.mark.parametrize("span", [Span(3, 3), Span(0, 9), Span(4, 2)])
def test_a_subject_outside_the_prompt_is_refused(span: Span, load_example: LoadExample) -> None:
    spec = GradientLensSpec((1, 2, 3, 4), NegativeLogLikelihood((TARGET,)), subject=span)
    with pytest.raises(InvalidRequest, match=r"subject\.span"):
        ask(load_example("gpt2").resident, spec)


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_verify_reports_a_held_error_for_every_matrix(name: str, load_example: LoadExample) -> None:
    kinds = NAMED_KINDS
    spec = GradientLensSpec(
        tuple(prompt(name, 5)), NegativeLogLikelihood((TARGET,)), matrices=kinds, verify=True
    )
    matrices, _ = ask(load_example(name).resident, spec)
    assert len({matrix.kind for matrix in matrices}) >= 6
    for matrix in matrices:
        assert matrix.verification is not None
        assert matrix.verification.held, matrix
