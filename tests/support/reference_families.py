"""How each family of plain Hugging Face models is read into the reference's terms."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from tests.support.reference_model import Affine, ReferenceBlock, ReferenceModel, ReferenceNorm


def reference_of(network: Any) -> ReferenceModel:
    """The float64 reference of a model of any family in `FAMILIES`."""
    return FAMILIES[network.config.model_type](network)


def exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64)


def linear(module: Any) -> Affine:
    """An `nn.Linear`, which stores `[d_out, d_in]`."""
    return Affine(exact(module.weight).T, None if module.bias is None else exact(module.bias))


def conv1d(module: Any) -> Affine:
    """transformers' Conv1D, which stores `[d_in, d_out]`."""
    return Affine(exact(module.weight), exact(module.bias))


def thirds(fused: Any) -> tuple[Affine, Affine, Affine]:
    """GPT-2's query, key and value, columns of one Conv1D."""
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
    """Dimensions 2i and 2i + 1 turn together, up to `rotary_dim`; the others stay."""
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
    """Dimensions i and i + e/2 turn together."""
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
    """y_i = x_i cos_i - x_j sin_i, y_j = x_j cos_j + x_i sin_j, for rows `y = x M`."""
    i, j = pair
    matrices[:, i, i], matrices[:, j, i] = cos[0], -sin[0]
    matrices[:, j, j], matrices[:, i, j] = cos[1], sin[1]


FAMILIES: dict[str, Callable[[Any], ReferenceModel]] = {
    "gpt2": gpt2,
    "gpt_neo": gpt_neo,
    "gptj": gptj,
    "llama": llama,
}
