"""The parts of a causal LM under the field's names, whatever its modules are called.

Adapters, one function per architecture family, build a `ModelView`; nothing else knows module
names.
Row convention everywhere: a linear map is `y = x W + b` with `W: [d_in, d_out]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from januslens_server.capture import End, Rotation, Tap
from januslens_server.capture.taps import Columns, rows, select
from januslens_server.graph.attention_pattern import Scoring
from januslens_server.graph.head_map import HeadMap
from januslens_server.graph.weights import Finish
from januslens_server.lens.head import LensHead
from januslens_server.models.experts import ExpertMatrices, Experts
from januslens_server.models.factors import Factors
from januslens_server.models.offload import read_parameter, read_tensor
from januslens_server.results import MatrixKind, ModelFacts


@dataclass(frozen=True)
class Linear:
    """One linear map of the model, possibly some `columns` of a fused module.

    `stored_as_rows` is True where the module keeps `[d_in, d_out]` (transformers' Conv1D) and
    False where it keeps the transpose (`nn.Linear`). `overwritten` where the model writes to the
    module's output in place: it is then handed a copy.
    """

    module: nn.Module
    stored_as_rows: bool
    columns: Columns | None = None
    overwritten: bool = False

    @property
    def weight(self) -> torch.Tensor:
        """`W: [d_in, d_out]`, a view of the resident parameter."""
        return self.rows_of(self.parameter())

    @property
    def bias(self) -> torch.Tensor | None:
        """`b: [d_out]`, or None."""
        bias = read_tensor(self.module, "bias")
        return None if bias is None else self.select(bias)

    def select(self, whole: torch.Tensor) -> torch.Tensor:
        """This map's columns of a tensor `[..., features]` of the whole module."""
        return select(whole, self.columns)

    @property
    def input(self) -> Tap:
        """Where `x: [batch, pos, d_in]` is read."""
        return Tap(self.module, End.INPUT)

    @property
    def output(self) -> Tap:
        """Where `y: [batch, pos, d_out]` is read."""
        return Tap(self.module, End.OUTPUT, self.columns, overwritten=self.overwritten)

    @property
    def whole(self) -> Tap:
        """The module's whole output, of which `output` is some columns: what VJPs arrive at."""
        return Tap(self.module, End.OUTPUT, overwritten=self.overwritten)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """What must be captured for `factors`."""
        return (self.input, self.whole)

    def factors(
        self, captured: Mapping[Tap, torch.Tensor], vjps: torch.Tensor
    ) -> dict[int | None, Factors]:
        """The gradient's factors from dL/d(whole) `[pos, features]`; of no expert."""
        inputs = rows(captured[self.input]).detach()
        positions = torch.arange(len(inputs), device=inputs.device)
        return {None: Factors(inputs, self.select(vjps), positions)}

    def parameter(self) -> torch.Tensor:
        """The resident parameter that holds the map."""
        return read_parameter(self.module, "weight")

    def rows_of(self, stored: torch.Tensor, _expert: int | None = None) -> torch.Tensor:
        """This map's `[d_in, d_out]` of a tensor stored as the parameter is."""
        return self.select(stored if self.stored_as_rows else stored.T)

    @cached_property
    def row_norms(self) -> torch.Tensor:
        """Euclidean norm `[d_in]` of each row of W, float32, computed once per model."""
        norms: torch.Tensor = self.weight.detach().float().norm(dim=1)
        return norms


@dataclass(frozen=True)
class Attention:
    """The attention of one block.

    `rotation` gives the rotary matrices of a prompt by its length. `query_map` and `key_map` are
    what stands between the linear maps and the rotation; values are clipped to `value_clip`.
    `finish` is what stands between the raw result and the residual; `added` reads what a
    post-norm gives there.
    """

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    n_heads: int
    n_kv_heads: int
    scoring: Scoring
    rotation: Callable[[int], Rotation] | None = None
    query_map: HeadMap = field(default_factory=HeadMap)
    key_map: HeadMap = field(default_factory=HeadMap)
    value_clip: float | None = None
    finish: Finish | None = None
    added: Tap | None = None


@dataclass(frozen=True)
class Mlp:
    """The MLP of one block: `ff1` is the gate where it is gated, then `up` is set.

    `finish` and `added` as for attention.
    """

    ff1: Linear
    ff2: Linear
    up: Linear | None = None
    finish: Finish | None = None
    added: Tap | None = None

    @property
    def taps(self) -> dict[str, Tap]:
        """What a forward pass captures, by its name in `LayerActivations`."""
        return {
            "mlp_input": self.ff1.input,
            "neurons": self.ff2.input,
            "mlp_sum": self.ff2.output,
        }

    @property
    def matrices(self) -> dict[MatrixKind, Linear]:
        """The weight matrices by kind."""
        if self.up is None:
            return {MatrixKind.FF1: self.ff1, MatrixKind.FF2: self.ff2}
        return {MatrixKind.GATE: self.ff1, MatrixKind.UP: self.up, MatrixKind.FF2: self.ff2}


@dataclass(frozen=True)
class Block:
    """One transformer block.

    `residual_mid` reads the residual after attention; None: attention and MLP are parallel.
    Without a pre-norm a sublayer reads the residual itself.
    """

    module: nn.Module
    attention: Attention
    mlp: Mlp | Experts
    residual_mid: Tap | None
    attention_prenorm: bool = True
    mlp_prenorm: bool = True

    @cached_property
    def matrices(self) -> dict[MatrixKind, Linear | ExpertMatrices]:
        """The block's weight matrices by kind."""
        present: dict[MatrixKind, Linear | ExpertMatrices] = {
            MatrixKind.Q: self.attention.query,
            MatrixKind.K: self.attention.key,
            MatrixKind.V: self.attention.value,
            MatrixKind.O: self.attention.output,
        }
        return present | self.mlp.matrices


@dataclass(frozen=True)
class ModelView:
    """A whole model: its input embedding, blocks, lens and sizes."""

    embedding: nn.Module
    blocks: tuple[Block, ...]
    lens: LensHead
    facts: ModelFacts


def is_norm(module: nn.Module) -> bool:
    """Whether a module has what a norm has: one weight vector, no submodules, and the name."""
    weight = getattr(module, "weight", None)
    named = "norm" in type(module).__name__.lower()
    return named and isinstance(weight, torch.Tensor) and weight.dim() == 1
