"""Edge cases of factorised gradients: ties, zeros, and more values requested than exist."""

from __future__ import annotations

import math

import pytest
import torch

from januslens_server.lens.backward_lens import (
    frobenius_norm,
    largest_entries,
    largest_first,
    reconstruction_error,
    sizes,
    spectrum,
)

INPUTS = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0], [5.0, 0.0]])
VJPS = torch.tensor([[0.0, 1.0, 0.0], [3.0, 0.0, 4.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])


def dense(inputs: torch.Tensor, vjps: torch.Tensor) -> torch.Tensor:
    """Return the gradient as a sum of outer products."""
    total = torch.zeros(inputs.shape[1], vjps.shape[1], dtype=torch.float64)
    for x, delta in zip(inputs.double(), vjps.double(), strict=True):
        total += torch.outer(x, delta)
    return total


def test_a_size_is_the_norm_of_its_outer_product() -> None:
    expected = [torch.outer(x, d).norm() for x, d in zip(INPUTS, VJPS, strict=True)]
    torch.testing.assert_close(sizes(INPUTS, VJPS).float(), torch.stack(expected))


def test_equal_components_are_ordered_by_position_and_zeros_last() -> None:
    assert largest_first(INPUTS, VJPS, 0).tolist() == [0, 1, 3, 2]
    assert largest_first(INPUTS, VJPS, 2).tolist() == [0, 1]
    assert largest_first(INPUTS, VJPS, 99).tolist() == [0, 1, 3, 2]


def test_the_norm_is_that_of_the_sum() -> None:
    assert frobenius_norm(INPUTS, VJPS) == pytest.approx(float(dense(INPUTS, VJPS).norm()))


def test_products_that_cancel_leave_no_norm() -> None:
    inputs, vjps = torch.cat([INPUTS, INPUTS]), torch.cat([VJPS, -VJPS])
    assert frobenius_norm(inputs, vjps) == pytest.approx(0.0, abs=1e-6)


def test_entries_are_the_largest_by_magnitude_with_their_signs() -> None:
    vectors = torch.tensor([[1.0, -3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    indices, values = largest_entries(vectors, 3)
    assert indices.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert values.tolist() == [[-3.0, 3.0, 2.0], [0.0, 0.0, 0.0]]
    assert largest_entries(vectors, 99)[0].shape == (2, 4)


def test_reconstruction_error_detects_one_wrong_element() -> None:
    gradient = dense(INPUTS, VJPS).float()
    assert reconstruction_error(INPUTS, VJPS, gradient) == 0.0
    size = float(gradient.norm())
    gradient[0, 0] += 1.0
    assert reconstruction_error(INPUTS, VJPS, gradient) == pytest.approx(1 / size, rel=0.05)
    nothing = torch.zeros(2, 3)
    assert reconstruction_error(torch.zeros(1, 2), torch.zeros(1, 3), nothing) == 0.0
    assert math.isfinite(reconstruction_error(INPUTS, VJPS, nothing))


@pytest.mark.parametrize("rank", [1, 2, 99])
def test_singular_triples_are_those_of_the_dense_gradient(rank: int) -> None:
    found = spectrum(INPUTS, VJPS, rank)
    values = torch.linalg.svdvals(dense(INPUTS, VJPS))[:rank]
    torch.testing.assert_close(found.values, values)
    count = len(values)
    rebuilt = torch.einsum("r,ri,ro->io", found.values, found.inputs, found.vjps)
    missing = (dense(INPUTS, VJPS) - rebuilt).norm().square()
    total = dense(INPUTS, VJPS).norm().square()
    assert float(found.explained.sum()) == pytest.approx(float(1 - missing / total))
    for basis in (found.inputs, found.vjps):
        eye = torch.eye(count, dtype=torch.float64)
        torch.testing.assert_close(basis @ basis.T, eye)


def test_sign_of_singular_vectors_follows_the_inputs() -> None:
    for sign in (1.0, -1.0):
        found = spectrum(sign * INPUTS, VJPS, 2)
        assert (found.inputs @ (sign * INPUTS.double().sum(0)) >= 0).all()


def test_one_position_has_one_triple_and_none_has_no_size() -> None:
    found = spectrum(INPUTS[:1], VJPS[:1], 5)
    assert found.values.tolist() == pytest.approx([5.0])
    assert found.explained.tolist() == pytest.approx([1.0])
    empty = spectrum(torch.zeros(2, 2), torch.zeros(2, 3), 5)
    assert empty.values.tolist() == [0.0, 0.0]
    assert len(empty.explained) == len(empty.values)
    assert empty.explained.tolist() == [0.0, 0.0]
