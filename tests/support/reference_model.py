"""A second forward pass, in float64, from weights that were read off a plain Hugging Face model.

Written from docs/semantics.md alone, with explicit matrices and loops: no hooks, and nothing of
the server. Rows are vectors: a linear map is `y = x W + b`. Sizes in shapes: T positions, H heads,
e dimensions of a head, d dimensions of the residual, m neurons, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """`y = x W + b`, `W: [d_in, d_out]`; without a bias `b` is None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class ReferenceNorm:
    """LayerNorm if `centred`, else RMSNorm."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool

    def scale(self, x: Tensor) -> Tensor:
        """What the norm divides by, `[..., 1]`."""
        x = self.centre(x)
        return (x.square().mean(-1, keepdim=True) + self.eps).sqrt()

    def centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def linear(self, part: Tensor, scale: Tensor) -> Tensor:
        """The norm's linear part applied to a part of its input, its scale given."""
        return self.centre(part) / scale * self.weight

    def __call__(self, x: Tensor) -> Tensor:
        y = self.linear(x, self.scale(x))
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class ReferenceBlock:
    """One block. `rotations` `[T, e, e]` are the rotary matrices: q_p becomes `q_p M_p`.

    `up` is set where the MLP is gated; then `ff1` is the gate. In a `parallel` block attention and
    MLP both read the one norm of the block's input.
    """

    attention_norm: ReferenceNorm
    mlp_norm: ReferenceNorm
    parallel: bool
    query: Affine
    key: Affine
    value: Affine
    output: Affine
    n_heads: int
    n_kv_heads: int
    scale: float
    window: int | None
    rotations: Callable[[int], Tensor] | None
    ff1: Affine
    up: Affine | None
    ff2: Affine
    activation: Callable[[Tensor], Tensor]

    def kv_head(self, head: int) -> int:
        """Which key and value head a query head shares."""
        return head // (self.n_heads // self.n_kv_heads)

    def rotation(self, position: int, length: int) -> Tensor:
        """M_p `[e, e]`; the identity where the layer has none."""
        size = self.query.weight.shape[1] // self.n_heads
        if self.rotations is None:
            return torch.eye(size, dtype=torch.float64)
        return self.rotations(length)[position]

    def columns(self, head: int, of: Affine, heads: int) -> Affine:
        """One head's columns of a projection."""
        size = of.weight.shape[1] // heads
        part = slice(head * size, (head + 1) * size)
        return Affine(of.weight[:, part], None if of.bias is None else of.bias[part])

    def asked(self, head: int, x: Tensor, position: int, length: int) -> Tensor:
        """q of one head, as it enters the dot product, from the attention input `[d]` at p."""
        return self.columns(head, self.query, self.n_heads)(x) @ self.rotation(position, length)

    def offered(self, head: int, x: Tensor, position: int, length: int) -> Tensor:
        """k for one query head, likewise."""
        key = self.columns(self.kv_head(head), self.key, self.n_kv_heads)
        return key(x) @ self.rotation(position, length)

    def held(self, head: int, x: Tensor) -> Tensor:
        """v for one query head from the attention input `[..., d]`."""
        return self.columns(self.kv_head(head), self.value, self.n_kv_heads)(x)

    def output_rows(self, head: int) -> Tensor:
        """W_O,h `[e, d]`."""
        size = self.output.weight.shape[0] // self.n_heads
        return self.output.weight[head * size : (head + 1) * size]

    def sources(self, position: int) -> range:
        """The positions that p attends to."""
        first = 0 if self.window is None else max(0, position + 1 - self.window)
        return range(first, position + 1)


@dataclass(frozen=True)
class BlockPass:
    """What one block computed: residual states and inputs `[T, d]`, `keys`, `queries` and
    `values` `[H, T, e]` (the first two rotated), `pattern` `[H, T, T]`, `concat` `[T, H e]`,
    `neurons` `[T, m]`."""

    block_input: Tensor
    attention_input: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    pattern: Tensor
    concat: Tensor
    attention_output: Tensor
    residual_mid: Tensor | None
    mlp_input: Tensor
    neurons: Tensor
    mlp_output: Tensor
    block_output: Tensor


@dataclass(frozen=True)
class ReferenceModel:
    """A causal language model; `unembedding` is `[V, d]`, `head_bias` `[V]` or None."""

    tokens: Tensor
    places: Tensor | None
    blocks: Sequence[ReferenceBlock]
    final_norm: ReferenceNorm
    unembedding: Tensor
    head_bias: Tensor | None

    def run(self, ids: Sequence[int]) -> list[BlockPass]:
        """The whole forward pass."""
        x = self.tokens[list(ids)]
        if self.places is not None:
            x = x + self.places[: len(ids)]
        passes = []
        for block in self.blocks:
            passes.append(run_block(block, x))
            x = passes[-1].block_output
        return passes

    def unembed(self, x: Tensor) -> Tensor:
        logits = x @ self.unembedding.T
        return logits if self.head_bias is None else logits + self.head_bias


def run_block(block: ReferenceBlock, x: Tensor) -> BlockPass:
    attended = block.attention_norm(x)
    length, heads = len(x), range(block.n_heads)
    places = range(length)

    def rows(of: Callable[[int, Tensor, int, int], Tensor]) -> Tensor:
        return torch.stack(
            [torch.stack([of(h, attended[p], p, length) for p in places]) for h in heads]
        )

    queries, keys = rows(block.asked), rows(block.offered)
    values = torch.stack([block.held(h, attended) for h in heads])
    pattern = attention_pattern(block, queries, keys)
    concat = torch.cat([pattern[h] @ values[h] for h in heads], dim=-1)
    attention = block.output(concat)
    middle = x + attention
    mlp_input = attended if block.parallel else block.mlp_norm(middle)
    neurons = block.activation(block.ff1(mlp_input))
    if block.up is not None:
        neurons = neurons * block.up(mlp_input)
    mlp = block.ff2(neurons)
    return BlockPass(
        block_input=x,
        attention_input=attended,
        queries=queries,
        keys=keys,
        values=values,
        pattern=pattern,
        concat=concat,
        attention_output=attention,
        residual_mid=None if block.parallel else middle,
        mlp_input=mlp_input,
        neurons=neurons,
        mlp_output=mlp,
        block_output=middle + mlp,
    )


def attention_pattern(block: ReferenceBlock, queries: Tensor, keys: Tensor) -> Tensor:
    """Naive softmax over the sources of each position."""
    length = queries.shape[1]
    pattern = torch.zeros(block.n_heads, length, length, dtype=torch.float64)
    for p in range(length):
        seen = list(block.sources(p))
        scores = (keys[:, seen] * queries[:, p : p + 1]).sum(-1) * block.scale
        weights = (scores - scores.max(dim=-1, keepdim=True).values).exp()
        pattern[:, p, seen] = weights / weights.sum(-1, keepdim=True)
    return pattern
