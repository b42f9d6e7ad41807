"""Compare losses and their gradients at the logits with the formulas in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from januslens_server.lens.backward_lens import (
    logit_difference,
    negative_log_likelihood,
    suppression_divergence,
)

Loss = Callable[[Tensor], Tensor]
VOCABULARY = 50
SUPPRESSED = (3, 4, 3)


def value_and_gradient(loss: Loss, logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    return value.detach().double(), torch.autograd.grad(value, leaf)[0].double()


def assert_same(found: Loss, formula: Loss, logits: Tensor, relative: float = 1e-5) -> None:
    value, gradient = value_and_gradient(found, logits)
    wanted_value, wanted = value_and_gradient(formula, logits.double())
    assert (value - wanted_value).abs() <= relative * wanted_value.abs()
    assert (gradient - wanted).norm() <= relative * wanted.norm()


def random_logits(positions: int) -> Tensor:
    return 3 * torch.randn(positions, VOCABULARY, generator=torch.Generator().manual_seed(1))


def suppression(logits: Tensor) -> Tensor:
    """KL(q || p) term by term; q is constant."""
    p = logits[-1].softmax(0)
    q = p.detach().clone()
    q[list(SUPPRESSED)] = 0
    q = q / q.sum()
    kept = q.nonzero()[:, 0]
    return (q[kept] * (q[kept].log() - p[kept].log())).sum()


@pytest.mark.parametrize("log_odds", [-20.0, -12.0, -5.0, 0.0, 5.0, 12.0, 150.0])
def test_suppression_of_unlikely_and_of_certain_tokens(log_odds: float) -> None:
    logits = random_logits(2)
    suppressed = sorted(set(SUPPRESSED))
    kept = [token for token in range(VOCABULARY) if token not in suppressed]
    odds = logits[-1, suppressed].logsumexp(0) - logits[-1, kept].logsumexp(0)
    logits[-1, suppressed] += log_odds - odds
    assert_same(suppression_divergence(SUPPRESSED), suppression, logits)


def test_negative_log_likelihood_of_several_targets() -> None:
    def written_out(logits: Tensor) -> Tensor:
        rows = enumerate((5, 9, 5), start=len(logits) - 3)
        odds = [logits[i].exp()[t] / logits[i].exp().sum() for i, t in rows]
        return -torch.stack(odds).log().sum()

    assert_same(negative_log_likelihood((5, 9, 5)), written_out, random_logits(6))


def test_descent_lowers_the_logit_difference() -> None:
    """The loss is the lead of the other token, so a descent step helps the preferred one."""
    logits = random_logits(2)
    assert_same(logit_difference(5, 9), lambda x: x[-1, 9] - x[-1, 5], logits)
    _, gradient = value_and_gradient(logit_difference(5, 9), logits)
    assert gradient[-1, 5] == -1
