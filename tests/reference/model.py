"""A float64 forward pass, written from docs/semantics.md, with weights of plain transformers.

It uses explicit matrices and loops, no hooks, and none of the server's code. Vectors are rows: a
linear map is `y = x W + b`. Sizes in shapes: T positions, H heads, e dimensions of a head, d
dimensions of the residual, m neurons, V tokens. `reference_of` reads the weights of a model of any
family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN


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
        """The divisor of the norm, `[..., 1]`."""
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

    In a gated MLP, `up` is set and `ff1` is the gate. In a `parallel` block, attention and MLP both
    read the only norm of the block's input.
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
        """The key-value head that a query head uses."""
        return head // (self.n_heads // self.n_kv_heads)

    def rotation(self, position: int, length: int) -> Tensor:
        """M_p `[e, e]`; the identity if the layer has no rotation."""
        size = self.query.weight.shape[1] // self.n_heads
        if self.rotations is None:
            return torch.eye(size, dtype=torch.float64)
        return self.rotations(length)[position]

    def columns(self, head: int, of: Affine, heads: int) -> Affine:
        """The columns of one head in a projection."""
        size = of.weight.shape[1] // heads
        part = slice(head * size, (head + 1) * size)
        return Affine(of.weight[:, part], None if of.bias is None else of.bias[part])

    def asked(self, head: int, x: Tensor, position: int, length: int) -> Tensor:
        """The rotated q of one head at p, from the attention input `[d]`."""
        return self.columns(head, self.query, self.n_heads)(x) @ self.rotation(position, length)

    def offered(self, head: int, x: Tensor, position: int, length: int) -> Tensor:
        """The rotated k of one query head, from the attention input."""
        key = self.columns(self.kv_head(head), self.key, self.n_kv_heads)
        return key(x) @ self.rotation(position, length)

    def held(self, head: int, x: Tensor) -> Tensor:
        """v of one query head, from the attention input `[..., d]`."""
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
    """The tensors of one block.

    Residual states and inputs are `[T, d]`; `keys`, `queries` and `values` `[H, T, e]` (the first
    two rotated); `pattern` `[H, T, T]`; `concat` `[T, H e]`; `neurons` `[T, m]`.
    """

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
        """Run the whole forward pass."""
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
    """Return a naive softmax over the sources of each position."""
    length = queries.shape[1]
    pattern = torch.zeros(block.n_heads, length, length, dtype=torch.float64)
    for p in range(length):
        seen = list(block.sources(p))
        scores = (keys[:, seen] * queries[:, p : p + 1]).sum(-1) * block.scale
        weights = (scores - scores.max(dim=-1, keepdim=True).values).exp()
        pattern[:, p, seen] = weights / weights.sum(-1, keepdim=True)
    return pattern


def reference_of(network: Any) -> ReferenceModel:
    """Return the float64 reference of a model of any family in `FAMILIES`."""
    return FAMILIES[network.config.model_type](network)


def exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64)


def linear(module: Any) -> Affine:
    """An `nn.Linear`, which stores `[d_out, d_in]`."""
    return Affine(exact(module.weight).T, None if module.bias is None else exact(module.bias))


def conv1d(module: Any) -> Affine:
    """Map transformers' Conv1D, which stores `[d_in, d_out]`."""
    return Affine(exact(module.weight), exact(module.bias))


def thirds(fused: Any) -> tuple[Affine, Affine, Affine]:
    """Split the columns of one Conv1D into GPT-2's query, key and value."""
    weights, biases = exact(fused.weight).chunk(3, dim=1), exact(fused.bias).chunk(3)
    query, key, value = (Affine(w, b) for w, b in zip(weights, biases, strict=True))
    return query, key, value


def layer_norm(module: Any) -> ReferenceNorm:
    return ReferenceNorm(exact(module.weight), exact(module.bias), module.eps, centred=True)


def rms_norm(module: Any, eps: float) -> ReferenceNorm:
    return ReferenceNorm(exact(module.weight), None, eps, centred=False)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    function: Callable[[Tensor], Tensor] = ACT2FN[name]
    return function


def gpt2(network: Any) -> ReferenceModel:
    config, body = network.config, network.transformer
    blocks = []
    for layer, block in enumerate(body.h):
        query, key, value = thirds(block.attn.c_attn)
        scale = (config.n_embd // config.n_head) ** -0.5
        if config.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1
        blocks.append(
            ReferenceBlock(
                attention_norm=layer_norm(block.ln_1),
                mlp_norm=layer_norm(block.ln_2),
                parallel=False,
                query=query,
                key=key,
                value=value,
                output=conv1d(block.attn.c_proj),
                n_heads=config.n_head,
                n_kv_heads=config.n_head,
                scale=scale,
                window=None,
                rotations=None,
                ff1=conv1d(block.mlp.c_fc),
                up=None,
                ff2=conv1d(block.mlp.c_proj),
                activation=activation(config.activation_function),
            )
        )
    return ReferenceModel(
        tokens=exact(body.wte.weight),
        places=exact(body.wpe.weight),
        blocks=blocks,
        final_norm=layer_norm(body.ln_f),
        unembedding=exact(network.lm_head.weight),
        head_bias=None,
    )


def gpt_neo(network: Any) -> ReferenceModel:
    config, body = network.config, network.transformer
    blocks = [
        ReferenceBlock(
            attention_norm=layer_norm(block.ln_1),
            mlp_norm=layer_norm(block.ln_2),
            parallel=False,
            query=linear(block.attn.attention.q_proj),
            key=linear(block.attn.attention.k_proj),
            value=linear(block.attn.attention.v_proj),
            output=linear(block.attn.attention.out_proj),
            n_heads=config.num_heads,
            n_kv_heads=config.num_heads,
            scale=1.0,
            window=config.window_size if reach == "local" else None,
            rotations=None,
            ff1=linear(block.mlp.c_fc),
            up=None,
            ff2=linear(block.mlp.c_proj),
            activation=activation(config.activation_function),
        )
        for block, reach in zip(body.h, config.attention_layers, strict=True)
    ]
    return ReferenceModel(
        tokens=exact(body.wte.weight),
        places=exact(body.wpe.weight),
        blocks=blocks,
        final_norm=layer_norm(body.ln_f),
        unembedding=exact(network.lm_head.weight),
        head_bias=None,
    )


def gptj(network: Any) -> ReferenceModel:
    config, body = network.config, network.transformer
    blocks = [
        ReferenceBlock(
            attention_norm=layer_norm(block.ln_1),
            mlp_norm=layer_norm(block.ln_1),
            parallel=True,
            query=linear(block.attn.q_proj),
            key=linear(block.attn.k_proj),
            value=linear(block.attn.v_proj),
            output=linear(block.attn.out_proj),
            n_heads=config.n_head,
            n_kv_heads=config.n_head,
            scale=(config.n_embd // config.n_head) ** -0.5,
            window=None,
            rotations=cache(partial(_neighbours_rotated, body, block.attn)),
            ff1=linear(block.mlp.fc_in),
            up=None,
            ff2=linear(block.mlp.fc_out),
            activation=activation(config.activation_function),
        )
        for block in body.h
    ]
    return ReferenceModel(
        tokens=exact(body.wte.weight),
        places=None,
        blocks=blocks,
        final_norm=layer_norm(body.ln_f),
        unembedding=exact(network.lm_head.weight),
        head_bias=exact(network.lm_head.bias),
    )


def _neighbours_rotated(body: Any, attention: Any, length: int) -> Tensor:
    """Rotate dimensions 2i and 2i + 1 as a pair, up to `rotary_dim`."""
    holder = getattr(body, "rotary_emb", attention)  # transformers 5.24 moved the table
    sin, cos = exact(holder.embed_positions[:length]).chunk(2, dim=-1)
    matrices = torch.eye(attention.head_dim, dtype=torch.float64).repeat(length, 1, 1)
    for i in range(sin.shape[1]):
        _turn(matrices, (2 * i, 2 * i + 1), (cos[:, i], cos[:, i]), (sin[:, i], sin[:, i]))
    return matrices


def llama(network: Any) -> ReferenceModel:
    config, body = network.config, network.model
    rotations = cache(partial(_halves_rotated, body))
    blocks = [
        ReferenceBlock(
            attention_norm=rms_norm(block.input_layernorm, config.rms_norm_eps),
            mlp_norm=rms_norm(block.post_attention_layernorm, config.rms_norm_eps),
            parallel=False,
            query=linear(block.self_attn.q_proj),
            key=linear(block.self_attn.k_proj),
            value=linear(block.self_attn.v_proj),
            output=linear(block.self_attn.o_proj),
            n_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
            scale=config.head_dim**-0.5,
            window=None,
            rotations=rotations,
            ff1=linear(block.mlp.gate_proj),
            up=linear(block.mlp.up_proj),
            ff2=linear(block.mlp.down_proj),
            activation=activation(config.hidden_act),
        )
        for block in body.layers
    ]
    return ReferenceModel(
        tokens=exact(body.embed_tokens.weight),
        places=None,
        blocks=blocks,
        final_norm=rms_norm(body.norm, config.rms_norm_eps),
        unembedding=exact(network.lm_head.weight),
        head_bias=None,
    )


def _halves_rotated(body: Any, length: int) -> Tensor:
    """Rotate dimensions i and i + e/2 as a pair."""
    cos, sin = body.rotary_emb(torch.zeros(1, length, 1), torch.arange(length)[None])
    cos, sin = exact(cos[0]), exact(sin[0])
    size = cos.shape[1]
    matrices = torch.zeros(length, size, size, dtype=torch.float64)
    for i in range(size // 2):
        j = i + size // 2
        _turn(matrices, (i, j), (cos[:, i], cos[:, j]), (sin[:, i], sin[:, j]))
    return matrices


def _turn(
    matrices: Tensor,
    pair: tuple[int, int],
    cos: tuple[Tensor, Tensor],
    sin: tuple[Tensor, Tensor],
) -> None:
    """Rotate pairs: y_i = x_i cos_i - x_j sin_i, y_j = x_j cos_j + x_i sin_j, with `y = x M`."""
    i, j = pair
    matrices[:, i, i], matrices[:, j, i] = cos[0], -sin[0]
    matrices[:, j, j], matrices[:, i, j] = cos[1], sin[1]


FAMILIES: dict[str, Callable[[Any], ReferenceModel]] = {
    "gpt2": gpt2,
    "gpt_neo": gpt_neo,
    "gptj": gptj,
    "llama": llama,
}
