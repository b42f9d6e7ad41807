"""What the model predicts at each position, and which token the trace reports on there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from januslens_server.errors import CancelCheck
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.vectors import read
from januslens_server.results import PositionTarget
from januslens_server.specs import LensSpec


@torch.inference_mode()
def position_targets(
    model: ResidentModel,
    residual: torch.Tensor,
    positions: Sequence[int],
    target: int | None,
    check_cancelled: CancelCheck,
) -> list[PositionTarget]:
    """One a position, from the last block's output `[pos, d_model]`.

    `target` None means the model's own next token at each position.
    """
    lens, rows = model.view.lens, residual[list(positions)]
    asked = None if target is None else rows.new_full((len(rows), 1), target, dtype=torch.long)
    table = read(lens, rows, LensSpec(top_k=1, bottom_k=0), asked, check_cancelled)
    predicted = table.top_ids[:, 0].tolist()
    own = asked is None
    ids = predicted if own else table.target_ids[:, 0].tolist()
    ranks = [0] * len(rows) if own else table.target_ranks[:, 0].tolist()
    logits = table.top_logits if own else table.target_logits
    probabilities = table.top_probabilities if own else table.target_probabilities
    constants = lens.attribution_constant(torch.tensor(ids, device=rows.device))
    return [
        PositionTarget(
            position=position,
            target_token_id=ids[i],
            predicted_token_id=predicted[i],
            target_probability=float(probabilities[i, 0]),
            target_rank=ranks[i],
            target_logit=float(logits[i, 0]),
            constant_logit_contribution=float(constants[i]),
        )
        for i, position in enumerate(positions)
    ]
