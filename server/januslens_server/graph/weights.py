"""The weights of one block that the flow graph reads, as plain float32 tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from januslens_server.capture import LayerActivations
from januslens_server.graph.attention_pattern import Scoring
from januslens_server.graph.head_map import HeadMap
from januslens_server.graph.terms import WeightedRows
from januslens_server.lens.norm import Norm


@dataclass(frozen=True)
class Finish:
    """What stands between a sublayer's raw result and the residual: a post-norm, a multiplier."""

    norm: Norm | None = None
    multiplier: float = 1.0

    def pull_back(self, direction: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """`[d_model]`: a direction after it, as one before it, the norm's scale fixed at `at`."""
        direction = direction * self.multiplier
        return direction if self.norm is None else self.norm.pull_back(direction, at)


@dataclass(frozen=True)
class AttentionWeights:
    """Per-head maps, row convention.

    `query` `[n_heads, d_model, d_head]`, `key` `[n_kv_heads, d_model, d_head]`, `output`
    `[n_heads, d_head, d_model]`, `bias` `[d_model]` or None, `row_norms` `[n_heads * d_head]`
    of the rows of W_O. `finish` None: the raw result is what is added to the residual.
    """

    query: torch.Tensor
    key: torch.Tensor
    output: torch.Tensor
    bias: torch.Tensor | None
    row_norms: torch.Tensor
    scoring: Scoring
    query_map: HeadMap
    key_map: HeadMap
    value_clip: float | None
    finish: Finish | None


@dataclass(frozen=True)
class MlpRow:
    """The MLP at one position: `terms` of its raw result, and the columns before each of them.

    `ff1` (gated: the gate) and `up` are `[d_model, n]` for the n rows of `terms`.
    """

    terms: WeightedRows
    ff1: torch.Tensor
    up: torch.Tensor | None


class MlpWeights(Protocol):
    """An MLP's weights, dense or of experts."""

    @property
    def finish(self) -> Finish | None:
        """None: the raw result is what is added to the residual."""

    def row(self, acts: LayerActivations, position: int) -> MlpRow:
        """The MLP at one position of a prompt."""


@dataclass(frozen=True)
class BlockWeights:
    """Attention and MLP of one block, and whether a norm stands before each."""

    attention: AttentionWeights
    mlp: MlpWeights
    attention_prenorm: bool
    mlp_prenorm: bool
