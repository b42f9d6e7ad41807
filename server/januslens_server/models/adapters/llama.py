"""Llama and the families that are derived from it.

`llama_like` maps what they share: a decoder of `layers` with `self_attn` and `mlp`, rotary
positions from one `rotary_emb`, grouped key-value heads, and Hugging Face's usual names for sizes.
Each function below it maps one family; its docstring lists the differences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from januslens_server.capture import End, Rotation, Tap
from januslens_server.graph.weights import Finish, HeadMap, Scoring
from januslens_server.lens.head import LensHead
from januslens_server.lens.norm import Norm
from januslens_server.models.adapters.modules import (
    consecutive,
    facts,
    layer_norm,
    lens,
    linear,
    norm_tap,
    rms_head_map,
    rms_norm,
    rotation,
    spanning_head_map,
    with_post_norm,
)
from januslens_server.models.experts import Experts
from januslens_server.models.matrices import Linear
from januslens_server.models.views import Attention, Block, Mlp, ModelView


@dataclass(frozen=True)
class Layer:
    """One of the decoder's layers, with the configuration and rotation that adapters need."""

    number: int
    module: Any
    config: Any
    rotation: Callable[[int], Rotation]

    @property
    def window(self) -> int | None:
        """Length of the layer's sliding window according to `layer_types`, or None."""
        sliding = self.config.layer_types[self.number] == "sliding_attention"
        return self.config.sliding_window if sliding else None


class Projections(NamedTuple):
    """The four linear maps of attention."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear


def llama_like(
    model: PreTrainedModel,
    block: Callable[[Layer], Block],
    head: LensHead | None = None,
    *,
    decoder: Any = None,
    interleaved: bool = False,
) -> ModelView:
    """Map a whole model, each of its layers with `block`.

    By default the lens is Llama's RMSNorm with the model's head, and `decoder` is `model.model`.
    `interleaved` means that a rotation pairs neighbouring dimensions.
    """
    config: Any = model.config.get_text_config()
    decoder = model.model if decoder is None else decoder
    shared_rotation = rotation(decoder, interleaved)
    layers = [Layer(i, module, config, shared_rotation) for i, module in enumerate(decoder.layers)]
    return ModelView(
        embedding=decoder.embed_tokens,
        blocks=tuple(block(layer) for layer in layers),
        lens=lens(model, rms_norm(decoder.norm)) if head is None else head,
        facts=facts(
            model,
            n_kv_heads=config.num_key_value_heads,
            d_head=decoder.layers[0].self_attn.head_dim,
            d_mlp=config.intermediate_size,
            max_positions=config.max_position_embeddings,
        ),
    )


def separate(attn: Any) -> Projections:
    """Map query, key, value and output projections that are separate modules."""
    return Projections(
        linear(attn.q_proj), linear(attn.k_proj), linear(attn.v_proj), linear(attn.o_proj)
    )


def attention(
    layer: Layer,
    projections: Projections | None = None,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Attention:
    """Map rotary attention over grouped heads, by default with `separate` projections."""
    attn = layer.module.self_attn
    query, key, value, output = separate(attn) if projections is None else projections
    return Attention(
        query=query,
        key=key,
        value=value,
        output=output,
        n_heads=layer.config.num_attention_heads,
        n_kv_heads=layer.config.num_key_value_heads,
        scoring=Scoring(scale=attn.scaling, window=window, soft_cap=soft_cap),
        rotation=layer.rotation,
    )


def gated_mlp(mlp: Any) -> Mlp:
    """Map a gated MLP whose gate, up and down projections are separate modules."""
    return Mlp(ff1=linear(mlp.gate_proj), up=linear(mlp.up_proj), ff2=linear(mlp.down_proj))


def pre_norm_block(layer: Layer, attention: Attention, mlp: Mlp | Experts | None = None) -> Block:
    """Map a block of attention, then MLP, with a norm before each."""
    return Block(
        module=layer.module,
        attention=attention,
        mlp=gated_mlp(layer.module.mlp) if mlp is None else mlp,
        residual_mid=Tap(layer.module.post_attention_layernorm, End.INPUT),
    )


def post_norm_block(
    layer: Layer, attention: Attention, norm: Callable[[Any], Norm], *, pre_norms: bool
) -> Block:
    """Map a block with a norm after attention and MLP; with `pre_norms` one before each as well."""
    module = layer.module
    after_attention = module.post_attention_layernorm
    after_mlp = module.post_feedforward_layernorm
    middle = module.pre_feedforward_layernorm if pre_norms else module.mlp
    return Block(
        module=module,
        attention=with_post_norm(attention, after_attention, norm(after_attention)),
        mlp=with_post_norm(gated_mlp(module.mlp), after_mlp, norm(after_mlp)),
        residual_mid=Tap(middle, End.INPUT),
        attention_prenorm=pre_norms,
        mlp_prenorm=pre_norms,
    )


def parallel_block(layer: Layer, attention: Attention, mlp: Mlp) -> Block:
    """Map a block whose attention and MLP read one norm and are added to the residual together."""
    return Block(module=layer.module, attention=attention, mlp=mlp, residual_mid=None)


def llama(model: PreTrainedModel) -> ModelView:
    """Llama: pre-RMSNorm, rotary positions, grouped key-value heads, gated MLP.

    Distinct points:
    - rotary pairs are half a head apart; `rotary_emb` applies the scaling of every RoPE variant;
    - `d_head` is a separate setting and need not be `d_model / n_heads`;
    - biases of attention and MLP are off by default.
    """
    return llama_like(model, _llama_block)


def _llama_block(layer: Layer) -> Block:
    return pre_norm_block(layer, attention(layer))


def mistral(model: PreTrainedModel) -> ModelView:
    """Mistral: Llama's block with a sliding window in all layers or none.

    Distinct points:
    - `sliding_window` applies to every layer and includes the position itself; None means no
      window;
    - no biases anywhere.
    """
    return llama_like(model, _mistral_block)


def _mistral_block(layer: Layer) -> Block:
    return pre_norm_block(layer, attention(layer, window=layer.config.sliding_window))


def qwen2(model: PreTrainedModel) -> ModelView:
    """Qwen2 and Qwen2.5: Llama's block with biased queries, keys and values.

    Distinct points:
    - query, key and value have biases, the output projection has none;
    - `layer_types` determines which layers use the sliding window.
    """
    return llama_like(model, _qwen2_block)


def _qwen2_block(layer: Layer) -> Block:
    return pre_norm_block(layer, attention(layer, window=layer.window))


def qwen3(model: PreTrainedModel) -> ModelView:
    """Qwen3: Llama's block with a norm of every head's queries and keys.

    Distinct points:
    - an RMSNorm over each head, with weights shared by all heads, precedes the rotation;
    - `d_head` is a separate setting;
    - `layer_types` determines which layers use the sliding window.
    """
    return llama_like(model, _qwen3_block)


def _qwen3_block(layer: Layer) -> Block:
    attn = layer.module.self_attn
    normed = replace(
        attention(layer, window=layer.window),
        query_map=rms_head_map(attn.q_norm),
        key_map=rms_head_map(attn.k_norm),
        query_norm=norm_tap(attn.q_norm),
        key_norm=norm_tap(attn.k_norm),
    )
    return pre_norm_block(layer, normed)


def smollm3(model: PreTrainedModel) -> ModelView:
    """SmolLM3: Llama's block, without rotary positions in some layers.

    Distinct points:
    - layers with a 0 in `no_rope_layers` do not rotate queries and keys;
    - `layer_types` determines which layers use the sliding window.
    """
    return llama_like(model, _smollm3_block)


def _smollm3_block(layer: Layer) -> Block:
    found = attention(layer, window=layer.window)
    rotates = layer.config.no_rope_layers[layer.number]
    return pre_norm_block(layer, found if rotates else replace(found, rotation=None))


def phi3(model: PreTrainedModel) -> ModelView:
    """Phi-3 and Phi-4: Llama's block with fused projections.

    Distinct points:
    - `qkv_proj` holds all queries, then all keys, then all values; `gate_up_proj` gate, then up;
    - the rotation may cover part of a head's dimensions, and depends on the length (LongRoPE);
    - `sliding_window` applies to every layer.
    """
    return llama_like(model, _phi3_block)


def _phi3_block(layer: Layer) -> Block:
    attn, mlp, config = layer.module.self_attn, layer.module.mlp, layer.config
    queries, keys = (
        n * attn.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
    )
    query, key, value = consecutive(attn.qkv_proj, queries, keys, keys)
    gate, up = consecutive(mlp.gate_up_proj, config.intermediate_size, config.intermediate_size)
    return pre_norm_block(
        layer,
        attention(
            layer,
            Projections(query, key, value, linear(attn.o_proj)),
            window=config.sliding_window,
        ),
        Mlp(ff1=gate, up=up, ff2=linear(mlp.down_proj)),
    )


def granite(model: PreTrainedModel) -> ModelView:
    """Granite: Llama's block with multipliers in four places.

    Distinct points:
    - embeddings are multiplied by `embedding_multiplier` before the first block;
    - a sublayer's result is multiplied by `residual_multiplier` before it is added;
    - scores are multiplied by `attention_multiplier` instead of 1 / sqrt(d_head);
    - logits are divided by `logits_scaling`.
    """
    config: Any = model.config
    decoder: Any = model.model
    head = lens(model, rms_norm(decoder.norm), logit_scale=1 / config.logits_scaling)
    return llama_like(model, _granite_block, head)


def _granite_block(layer: Layer) -> Block:
    finish = Finish(multiplier=layer.config.residual_multiplier)
    return pre_norm_block(
        layer,
        replace(attention(layer), finish=finish),
        replace(gated_mlp(layer.module.mlp), finish=finish),
    )


def starcoder2(model: PreTrainedModel) -> ModelView:
    """StarCoder2: Llama's attention with biases and LayerNorms, and GPT-2's MLP.

    Distinct points:
    - the MLP is not gated: `c_fc`, then `c_proj`;
    - every linear map has a bias unless `use_bias` is off; the head has none;
    - `sliding_window` applies to every layer.
    """
    decoder: Any = model.model
    return llama_like(model, _starcoder2_block, lens(model, layer_norm(decoder.norm)))


def _starcoder2_block(layer: Layer) -> Block:
    mlp = layer.module.mlp
    return pre_norm_block(
        layer,
        attention(layer, window=layer.config.sliding_window),
        Mlp(ff1=linear(mlp.c_fc), ff2=linear(mlp.c_proj)),
    )


# A constant in the norm's code, not in the configuration.
OLMO_EPSILON = 1e-5


def olmo(model: PreTrainedModel) -> ModelView:
    """OLMo: Llama's block with LayerNorms without weights, and optionally clipped projections.

    Distinct points:
    - norms have neither weight nor bias;
    - `clip_qkv` clips queries, keys and values in place, in the outputs of their linear maps.
    """
    embedding: Any = model.get_input_embeddings()
    ones = torch.ones(embedding.weight.shape[1], device=embedding.weight.device)
    return llama_like(model, _olmo_block, lens(model, Norm(ones, None, OLMO_EPSILON, centred=True)))


def _olmo_block(layer: Layer) -> Block:
    clip: float | None = layer.config.clip_qkv
    plain = attention(layer)
    if clip is None:
        return pre_norm_block(layer, plain)
    clipped = replace(
        plain,
        query=replace(plain.query, overwritten=True),
        key=replace(plain.key, overwritten=True),
        value=replace(plain.value, overwritten=True),
        query_map=HeadMap(clip=clip),
        key_map=HeadMap(clip=clip),
        value_map=HeadMap(clip=clip),
    )
    return pre_norm_block(layer, clipped)


def olmo2(model: PreTrainedModel) -> ModelView:
    """OLMo 2: Llama's sublayers with post-norms instead of pre-norms.

    Distinct points:
    - attention and MLP read the residual itself; their results are normed before they are added;
    - an RMSNorm of queries and keys, whose mean square spans all heads, precedes the rotation.
    """
    return llama_like(model, _olmo2_block)


def _olmo2_block(layer: Layer) -> Block:
    attn = layer.module.self_attn
    normed = replace(
        attention(layer),
        query_map=spanning_head_map(attn.q_norm, attn.head_dim),
        key_map=spanning_head_map(attn.k_norm, attn.head_dim),
        query_norm=norm_tap(attn.q_norm),
        key_norm=norm_tap(attn.k_norm),
    )
    return post_norm_block(layer, normed, rms_norm, pre_norms=False)
