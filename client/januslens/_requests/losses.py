"""The losses that a gradient can be of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from januslens._requests.inputs import TargetLike, target_message, token_ids
from januslens.v1 import gradient_lens_pb2


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """`-log p(target | prompt)` in nats; several target tokens are summed, teacher-forced.

    The paper's loss, and what `gradient_lens(prompt, target)` means.
    """

    target: TargetLike


@dataclass(frozen=True)
class LogitDifference:
    """`logit(other) - logit(preferred)` at the last position."""

    preferred: TargetLike
    other: TargetLike


@dataclass(frozen=True)
class KlDivergence:
    """`KL(p without the suppressed tokens, renormalised || p)`, the first argument held fixed."""

    suppressed: Sequence[int]


Loss = NegativeLogLikelihood | LogitDifference | KlDivergence


def set_loss(request: gradient_lens_pb2.GradientLensRequest, loss: Loss) -> None:
    """Put a loss into a request.

    Raises:
        TypeError: It is none of the three.
        ValueError: A target or the suppressed tokens are empty.
    """
    match loss:
        case NegativeLogLikelihood(target):
            request.nll.target.CopyFrom(target_message(target))
        case LogitDifference(preferred, other):
            request.logit_difference.preferred.CopyFrom(target_message(preferred, "preferred"))
            request.logit_difference.other.CopyFrom(target_message(other, "other"))
        case KlDivergence(suppressed):
            request.kl.suppressed.CopyFrom(token_ids(suppressed, "suppressed"))
        case _:
            raise TypeError(
                "expected a NegativeLogLikelihood, LogitDifference or KlDivergence; "
                f"got {type(loss).__name__}"
            )
