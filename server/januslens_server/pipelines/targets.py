"""What the model predicts at each position, and which token the trace reports on there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from januslens_server.lens.projection import project
from januslens_server.models.resident import ResidentModel
from januslens_server.results import PositionTarget
from januslens_server.specs import LensSpec


@torch.inference_mode()
def position_targets(
    model: ResidentModel, residual: torch.Tensor, positions: Sequence[int], target: int | None
) -> list[PositionTarget]:
    """One a position, from the last block's output `[pos, d_model]`.

    `target` None means the model's own next token at each position.
    """
    lens, rows = model.view.lens, residual[list(positions)]
    best = LensSpec(top_k=1, bottom_k=0)
    predicted = project(lens, rows, best).top_ids[:, 0]
    ids = [p if target is None else target for p in predicted.tolist()]
    chosen = torch.tensor(ids, device=rows.device)
    table = project(lens, rows, best, chosen[:, None])
    constants = lens.attribution_constant(chosen).tolist()
    return [
        PositionTarget(
            position=position,
            target_token_id=ids[i],
            predicted_token_id=int(predicted[i]),
            target_probability=float(table.target_probabilities[i, 0]),
            target_rank=int(table.target_ranks[i, 0]),
            target_logit=float(table.target_logits[i, 0]),
            constant_logit_contribution=constants[i],
        )
        for i, position in enumerate(positions)
    ]
