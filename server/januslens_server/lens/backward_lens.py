"""The mathematics of the Backward Lens (Katz et al., 2024): losses, gradient factors, segments.

The gradient of a weight matrix is a sum of outer products (section 4.1, eq. 8):
`dL/dW = sum_i x_i^T delta_i` over positions i, where x_i is the input of the linear map and delta_i
the VJP at its output. Norms, singular values and the changes of single neurons (section 5) are
computed from these factors. Only `reconstruction_error` forms a matrix `[d_in, d_out]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch


@dataclass(frozen=True)
class Loss:
    """A loss, which `of` computes from the float32 logits `[positions, vocab]` at the end."""

    positions: int
    of: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        return self.of(logits)


def negative_log_likelihood(targets: Sequence[int]) -> Loss:
    """Return the loss `-sum_i log p(target_i | prompt, target_0 .. target_(i-1))`, in nats.

    The input is the prompt and all targets except the last (teacher forcing), so the last
    `len(targets)` positions predict the targets.
    """

    def loss(logits: torch.Tensor) -> torch.Tensor:
        predicting = logits[-len(targets) :].log_softmax(dim=-1)
        chosen = torch.tensor(targets, device=logits.device)
        return -predicting.gather(1, chosen[:, None]).sum()

    return Loss(len(targets), loss)


def logit_difference(preferred: int, other: int) -> Loss:
    """Return the loss `logit(other) - logit(preferred)` at the last position, in logits."""

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return logits[-1, other] - logits[-1, preferred]

    return Loss(1, loss)


def suppression_divergence(suppressed: Sequence[int]) -> Loss:
    """Return the loss `KL(q || p)` at the last position, in nats.

    q is p without the suppressed tokens, renormalised and held fixed. It is the distribution
    nearest to p in which these tokens have probability 0. With the suppressed tokens' probability
    s, the divergence is -log(1 - s), and its gradient is p - q. If s is near 0 or 1, float32 cannot
    represent these differences, so the loss is computed from the log-odds of s.
    """

    def loss(logits: torch.Tensor) -> torch.Tensor:
        kept = torch.ones_like(logits[-1], dtype=torch.bool)
        kept[list(suppressed)] = False
        odds = logits[-1][~kept].logsumexp(dim=0) - logits[-1][kept].logsumexp(dim=0)
        return torch.nn.functional.softplus(odds)

    return Loss(1, loss)


def sizes(inputs: torch.Tensor, vjps: torch.Tensor) -> torch.Tensor:
    """Return ||x_i|| ||delta_i|| `[n]`, the norm of each component, in float64."""
    return lengths(inputs) * lengths(vjps)


def lengths(vectors: torch.Tensor) -> torch.Tensor:
    """Return the norm of each row, in float64 because squares of small gradients underflow."""
    norms: torch.Tensor = vectors.double().norm(dim=-1)
    return norms


def largest_first(inputs: torch.Tensor, vjps: torch.Tensor, count: int) -> torch.Tensor:
    """Return the positions `[k]` of the largest components, largest first; `count` 0 means all.

    Components of equal size are ordered by position.
    """
    order = sizes(inputs, vjps).sort(descending=True, stable=True).indices
    return order[:count] if count else order


def frobenius_norm(inputs: torch.Tensor, vjps: torch.Tensor) -> torch.Tensor:
    """Return ||sum_i x_i^T delta_i||_F in float64, a tensor `[]`.

    It is computed from the two Gram matrices. If there are so many components that the dense sum is
    smaller, the sum is used.
    """
    x, delta = inputs.double(), vjps.double()
    (count, d_in), d_out = x.shape, delta.shape[1]
    if count * (d_in + d_out) > d_in * d_out:
        norm: torch.Tensor = (x.T @ delta).norm()
        return norm
    squared = ((x @ x.T) * (delta @ delta.T)).sum()
    return squared.clamp_min(0).sqrt()


def cosine(
    a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]
) -> float | None:
    """Return `<A, B>_F / (||A||_F ||B||_F)` of two sums of outer products; None if one is zero.

    `a` has the factors `[n, d_in]` and `[n, d_out]` of A, and `b` those of B, which may have
    another number of rows. The dot product of two outer products is that of their inputs times that
    of their outputs. All sums are in float64.
    """
    norms = frobenius_norm(*a) * frobenius_norm(*b)
    if norms == 0:
        return None
    inputs = a[0].double() @ b[0].double().T
    return float((inputs * (a[1].double() @ b[1].double().T)).sum() / norms)


def largest_entries(vectors: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return indices and values `[n, count]` of each row's largest entries by absolute value."""
    order = vectors.abs().sort(dim=-1, descending=True, stable=True).indices[:, :count]
    order = order.clone()  # a view would keep the whole order in memory
    return order, vectors.gather(1, order)


def reconstruction_error(inputs: torch.Tensor, vjps: torch.Tensor, dense: torch.Tensor) -> float:
    """Return `||sum_i x_i^T delta_i - dense||_F / ||dense||_F`, or 0 if both are zero."""
    dense = dense.float()
    difference = (inputs.float().T @ vjps.float() - dense).norm()
    size = dense.norm()
    return float(difference / size) if size > 0 else float(difference)


@dataclass(frozen=True)
class SingularTriples:
    """Singular `values` `[r]`, largest first, with `inputs` `[r, d_in]` and `vjps` `[r, d_out]`.

    `explained` `[r]` is the square of each value divided by the squared Frobenius norm. Signs are
    chosen so that each input vector has a non-negative dot product with the sum of the prompt's
    inputs. Then the tokens that a descent step promotes are at the bottom of the VJP vectors, as
    for the VJPs.
    """

    values: torch.Tensor
    explained: torch.Tensor
    inputs: torch.Tensor
    vjps: torch.Tensor


def spectrum(inputs: torch.Tensor, vjps: torch.Tensor, rank: int) -> SingularTriples:
    """Return the `rank` largest singular triples of `sum_i x_i^T delta_i`, exact, in float64.

    `inputs` are `[n, d_in]`, `vjps` `[n, d_out]`. With thin QR decompositions `X^T = Q_x R_x` and
    `D^T = Q_d R_d`, the gradient is `Q_x (R_x R_d^T) Q_d^T`. Only the small matrix in the middle is
    decomposed.
    """
    input_basis, input_mix = torch.linalg.qr(inputs.double().T)
    vjp_basis, vjp_mix = torch.linalg.qr(vjps.double().T)
    left, values, right = torch.linalg.svd(input_mix @ vjp_mix.T, full_matrices=False)
    total = values.square().sum()
    count = min(rank, len(values))
    input_side = (input_basis @ left[:, :count]).T
    vjp_side = (vjp_basis @ right[:count].T).T
    signs = torch.where(input_side @ inputs.double().sum(0) < 0, -1.0, 1.0)[:, None]
    return SingularTriples(
        values=values[:count],
        explained=torch.where(total > 0, values[:count].square() / total, 0.0),
        inputs=input_side * signs,
        vjps=vjp_side * signs,
    )


def change_norms(outside: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Return ||sum_i outside_i[j] residual_i|| for every neuron j `[d_mlp]`, in float64.

    `residual` `[n, d_model]` are the factors in the residual basis (inputs of FF1, VJPs of FF2),
    and `outside` `[n, d_mlp]` those over neurons (VJPs of FF1, inputs of FF2). The norms are
    computed from the Gram matrix, without a matrix of the weight's size.
    """
    outside, residual = outside.double(), residual.double()
    if len(residual) > residual.shape[1]:  # the Gram matrix would be larger than the changes
        norms: torch.Tensor = (outside.T @ residual).norm(dim=1)
        return norms
    squared = ((residual @ residual.T @ outside) * outside).sum(0)
    return squared.clamp_min(0).sqrt()


def descent_changes(
    outside: torch.Tensor, residual: torch.Tensor, neurons: torch.Tensor, learning_rate: float
) -> torch.Tensor:
    """Return `-learning_rate sum_i outside_i[j] residual_i` `[k, d_model]` for neurons j `[k]`."""
    return -learning_rate * (outside[:, neurons].T @ residual)


class Segment(StrEnum):
    """Segments of a prompt; every position is in exactly one."""

    FIRST = "first_token"
    SUBJECT = "subject"
    LAST_SUBJECT = "last_subject_token"
    REST = "rest"
    LAST = "last_token"


def segment_positions(
    subject_start: int, subject_end: int, length: int
) -> dict[Segment, list[int]]:
    """Return the positions of each segment of a prompt; `subject_end` is excluded.

    A position is in the first segment that applies: last token, last token of the subject, subject,
    first token, rest. Segments without positions are left out.
    """
    segments: dict[Segment, list[int]] = {}
    for position in range(length):
        segments.setdefault(_segment(position, subject_start, subject_end, length), []).append(
            position
        )
    return {segment: segments[segment] for segment in Segment if segment in segments}


def _segment(position: int, subject_start: int, subject_end: int, length: int) -> Segment:
    if position == length - 1:
        return Segment.LAST
    if position == subject_end - 1:
        return Segment.LAST_SUBJECT
    if subject_start <= position < subject_end:
        return Segment.SUBJECT
    return Segment.FIRST if position == 0 else Segment.REST
