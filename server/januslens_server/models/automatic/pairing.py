"""Choosing among readings of a block's attention by which one gives what the model computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from januslens_server.capture import Rotation, capturing
from januslens_server.errors import ModelFailed
from januslens_server.graph.heads import head_row
from januslens_server.models.automatic.probe import probe_ids
from januslens_server.models.layer_capture import layer_activations, layer_taps
from januslens_server.models.views import Block
from januslens_server.models.weights import block_weights

# Relative error of the heads' results; the right reading is off by rounding, a wrong one by tens of
# per cent.
TOLERANCE = 5e-2


@torch.inference_mode()
def best_reading(network: PreTrainedModel, layer: int, readings: Sequence[Block]) -> Block:
    """The reading whose attention, recomputed, comes nearest to the captured one.

    Raises `ModelFailed` if none comes near.
    """
    ids = probe_ids(network)
    with capturing(layer_taps(readings[0])) as captured:
        network(input_ids=ids, use_cache=False)
    errors = [_attention_error(reading, captured, ids.shape[1]) for reading in readings]
    best = min(range(len(readings)), key=lambda i: errors[i])
    if not errors[best] <= TOLERANCE:
        raise ModelFailed(
            f"expected to reproduce the attention of layer {layer} from its queries and keys, "
            f"got an error of {errors[best]:.2g}: its scores are made in a way not known here"
        )
    return readings[best]


def _attention_error(block: Block, captured: dict[str, torch.Tensor], length: int) -> float:
    """`||sum_s a_ps v_s - z_p|| / ||z_p||` over all heads at the last position p."""
    row = head_row(
        length - 1, layer_activations(block, captured, length), block_weights(block).attention
    )
    rebuilt = torch.einsum("hs,hse->he", row.pattern, row.values)
    return float((rebuilt - row.concat).norm() / row.concat.norm())


def pairings(cos: torch.Tensor, sin: torch.Tensor) -> list[Rotation]:
    """What models make of the `[pos, rotary]` that their rotary embedding gives.

    Pairs half a head apart; neighbouring pairs; neighbouring pairs that take each angle from the
    first half.
    """
    cos_twice, sin_twice = (
        angles.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for angles in (cos, sin)
    )
    return [
        Rotation(cos, sin, interleaved=False),
        Rotation(cos, sin, interleaved=True),
        Rotation(cos_twice, sin_twice, interleaved=True),
    ]
