"""Check the numbers of a trace: lens against logits, shares, and logit contributions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from januslens_server.errors import CancelCheck
from januslens_server.graph.flow import Flow
from januslens_server.lens.projection import rows_at_once
from januslens_server.models.resident import ResidentModel
from januslens_server.models.runner import ForwardPass
from januslens_server.results import Guarantee, NodeColumn, NodeKind, PositionTarget
from januslens_server.transfer import to_device

LENS = "last lens = logits"
SHARES = "parts sum to wholes"
CONTRIBUTIONS = "contributions sum to logit"

# Maximum relative errors. In half precision, the model rounds every activation.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}


class TraceChecks:
    """Accumulates the checks of one trace over its flows, including nodes that are not sent."""

    def __init__(
        self,
        model: ResidentModel,
        passed: ForwardPass,
        targets: Sequence[PositionTarget],
        other: int | None,
        check_cancelled: CancelCheck,
    ) -> None:
        """`passed` has the model's own logits; the model's data type determines the tolerance.

        `other` is the second token of a logit difference.
        """
        self._lens = model.view.lens
        self._passed = passed
        self._targets = targets
        self._other = other
        self._check_cancelled = check_cancelled
        self._tolerance = TOLERANCES[model.provenance.data_type]
        self._shares: defaultdict[str, float] = defaultdict(float)
        self._contributions: defaultdict[int, float] = defaultdict(float)

    def see(self, flow: Flow) -> None:
        """Add up the shares and contributions of a flow with all of its nodes."""
        positions = flow.nodes.column(NodeColumn.POSITION).tolist()
        position_of = dict(zip(flow.nodes.ids, positions, strict=True))
        for edge in flow.numbers().edges:
            if edge.share is not None:
                self._shares[edge.target] += edge.share
            if edge.logit_contribution is not None and _adds_to_residual(edge.source):
                self._contributions[position_of[edge.target]] += edge.logit_contribution

    def guarantees(self, whole: bool) -> list[Guarantee]:
        """Return the measured errors.

        `whole` means that contributions were computed for every layer, so they must add up to the
        target's logit.
        """
        measured = [(LENS, self._lens_error()), (SHARES, self._shares_error())]
        if whole:
            measured.append((CONTRIBUTIONS, self._contribution_error()))
        return [Guarantee(name, error, self._tolerance) for name, error in measured]

    @torch.inference_mode()
    def _lens_error(self) -> float:
        """Largest difference between the last block's lens and the logits, relative to the logits.

        Tokens that the model excludes have a logit of minus infinity and are not compared.
        """
        at = [target.position for target in self._targets]
        lens, chunk = self._lens, rows_at_once(self._lens)
        largest = difference = 0.0
        for start in range(0, len(at), chunk):
            self._check_cancelled()
            residual = self._passed.residual[at[start : start + chunk]]
            logits = self._passed.logits[start : start + chunk].float()
            read = lens.cap(lens.logits(lens.normed(residual)))
            excluded = logits.isneginf()
            distances = (read - logits).abs().masked_fill_(excluded, 0)
            difference = max(difference, float(distances.max()))
            largest = max(largest, float(logits.abs().masked_fill_(excluded, 0).max()))
        return difference / (largest or 1.0)

    def _shares_error(self) -> float:
        """Largest distance from 1 of the total share of a sum's parts."""
        # Sums that are zero have no shares.
        return max((abs(total - 1) for total in self._shares.values()), default=0.0)

    @torch.inference_mode()
    def _contribution_error(self) -> float:
        """Largest difference between all contributions and the target's logit, relative to it."""
        residual = self._passed.residual[[target.position for target in self._targets]]
        ids = [target.target_token_id for target in self._targets]
        tokens = to_device(ids, residual.device)
        logits = self._lens.target_logits(residual, tokens)
        if self._other is not None:
            others = torch.full_like(tokens, self._other)
            logits = logits - self._lens.target_logits(residual, others)
        errors = [
            abs(self._contributions[target.position] + target.constant_logit_contribution - logit)
            / max(abs(logit), 1.0)
            for target, logit in zip(self._targets, logits.tolist(), strict=True)
        ]
        return float(max(errors))


def _adds_to_residual(node_id: str) -> bool:
    """Whether a node is a term of the last residual.

    An OTHER node is a part of such a term, or what an intervention added to the residual itself.
    """
    *place, kind = node_id.split("/")
    if NodeKind.OTHER.name in place:
        return kind in {"RESIDUAL_MID", "BLOCK_OUTPUT"}
    return kind in {"BLOCK_INPUT", "ATTENTION_OUTPUT", "MIXER_OUTPUT", "MLP_OUTPUT"}
