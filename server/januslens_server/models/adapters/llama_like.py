"""What the many families that grew out of Llama share; each adapter says what it does otherwise.

A decoder of `layers` with `self_attn` and `mlp`, rotary positions from one `rotary_emb`, grouped
key-value heads, and Hugging Face's common names for every size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from januslens_server.capture import End, Rotation, Tap
from januslens_server.graph.attention_pattern import Scoring
from januslens_server.lens.head import LensHead
from januslens_server.lens.norm import Norm
from januslens_server.models.adapters.parts import facts, finished, lens, linear, rms_norm, rotation
from januslens_server.models.experts import Experts
from januslens_server.models.views import Attention, Block, Linear, Mlp, ModelView


@dataclass(frozen=True)
class Layer:
    """One of the decoder's layers, with what of the model its adapter needs."""

    number: int
    module: Any
    config: Any
    rotation: Callable[[int], Rotation]

    @property
    def window(self) -> int | None:
        """How far the layer attends, by its entry in `layer_types`."""
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
    """Map a model whose layers `block` maps.

    The lens is Llama's RMSNorm and the model's head, `decoder` is `model.model`, unless given.
    """
    config: Any = model.config.get_text_config()
    decoder = model.model if decoder is None else decoder
    turning = rotation(decoder, interleaved)
    layers = [Layer(i, module, config, turning) for i, module in enumerate(decoder.layers)]
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
    """Query, key, value and output in modules of their own."""
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
    """Rotary attention over grouped heads, with `separate` projections unless given."""
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
    """Gate, up and down in modules of their own."""
    return Mlp(ff1=linear(mlp.gate_proj), up=linear(mlp.up_proj), ff2=linear(mlp.down_proj))


def pre_norm_block(layer: Layer, attention: Attention, mlp: Mlp | Experts | None = None) -> Block:
    """Attention, then the MLP, a norm before each."""
    return Block(
        module=layer.module,
        attention=attention,
        mlp=gated_mlp(layer.module.mlp) if mlp is None else mlp,
        residual_mid=Tap(layer.module.post_attention_layernorm, End.INPUT),
    )


def post_norm_block(
    layer: Layer, attention: Attention, norm: Callable[[Any], Norm], *, pre_norms: bool
) -> Block:
    """Attention, then the MLP, a norm behind each; with `pre_norms` one before each as well."""
    module = layer.module
    after_attention = module.post_attention_layernorm
    after_mlp = module.post_feedforward_layernorm
    middle = module.pre_feedforward_layernorm if pre_norms else module.mlp
    return Block(
        module=module,
        attention=finished(attention, after_attention, norm(after_attention)),
        mlp=finished(gated_mlp(module.mlp), after_mlp, norm(after_mlp)),
        residual_mid=Tap(middle, End.INPUT),
        attention_prenorm=pre_norms,
        mlp_prenorm=pre_norms,
    )


def parallel_block(layer: Layer, attention: Attention, mlp: Mlp) -> Block:
    """Attention and MLP on one and the same norm, added to the residual together."""
    return Block(module=layer.module, attention=attention, mlp=mlp, residual_mid=None)
