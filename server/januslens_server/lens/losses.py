"""Losses that a gradient can be asked for, each a function of logits, in nats.

The default of the contract is the Backward Lens paper's (section 3): the negative
log-likelihood of a target after the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Loss:
    """A scalar `of` the logits `[positions, vocab]` of a prompt's last `positions`, in float32."""

    positions: int
    of: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The loss."""
        return self.of(logits)


def negative_log_likelihood(targets: Sequence[int]) -> Loss:
    """`-sum_i log p(target_i | prompt, target_0 .. target_(i-1))`, nats.

    The last `len(targets)` positions predict the targets: the input is the prompt and
    all targets but the last (teacher forcing).
    """

    def loss(logits: torch.Tensor) -> torch.Tensor:
        predicting = logits[-len(targets) :].log_softmax(dim=-1)
        chosen = torch.tensor(targets, device=logits.device)
        return -predicting.gather(1, chosen[:, None]).sum()

    return Loss(len(targets), loss)


def logit_difference(preferred: int, other: int) -> Loss:
    """`logit(other) - logit(preferred)` at the last position, in logits."""

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return logits[-1, other] - logits[-1, preferred]

    return Loss(1, loss)


def suppression_divergence(suppressed: Sequence[int]) -> Loss:
    """`KL(q || p)` at the last position, nats.

    q is p without the suppressed tokens, renormalised and held fixed: the nearest distribution
    that never says them. The divergence is -log(1 - s), s the suppressed tokens' probability, and
    its gradient p - q. Neither difference survives float32 where s is near 0 or 1, so it is
    computed from the log-odds of s.
    """

    def loss(logits: torch.Tensor) -> torch.Tensor:
        kept = torch.ones_like(logits[-1], dtype=torch.bool)
        kept[list(suppressed)] = False
        odds = logits[-1][~kept].logsumexp(dim=0) - logits[-1][kept].logsumexp(dim=0)
        return torch.nn.functional.softplus(odds)

    return Loss(1, loss)
