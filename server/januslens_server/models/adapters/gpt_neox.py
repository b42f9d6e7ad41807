"""GPT-NeoX (Pythia): attention and MLP in parallel on two norms, partial rotary positions.

Distinct points:
- attention and MLP are parallel, or one after the other without `use_parallel_residual`; either
  way each has a LayerNorm of its own;
- `query_key_value` holds query, key and value head by head;
- the first `rotary_pct` of a head's dimensions turn, in pairs half that width apart.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from januslens_server.capture import End, Tap
from januslens_server.graph.attention_pattern import Scoring
from januslens_server.models.adapters.parts import (
    by_head,
    facts,
    layer_norm,
    lens,
    linear,
    rotation,
)
from januslens_server.models.views import Attention, Block, Mlp, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `GPTNeoXForCausalLM`."""
    config: Any = model.config
    decoder: Any = model.gpt_neox
    return ModelView(
        embedding=decoder.embed_in,
        blocks=tuple(_block(module, config, decoder) for module in decoder.layers),
        lens=lens(model, layer_norm(decoder.final_layer_norm)),
        facts=facts(
            model, d_mlp=config.intermediate_size, max_positions=config.max_position_embeddings
        ),
    )


def _block(module: Any, config: Any, decoder: Any) -> Block:
    attn = module.attention
    n_heads = config.num_attention_heads
    query, key, value = by_head(attn.query_key_value, n_heads, attn.head_size)
    attention = Attention(
        query=query,
        key=key,
        value=value,
        output=linear(attn.dense),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        scoring=Scoring(scale=attn.scaling),
        rotation=rotation(decoder),
    )
    parallel = config.use_parallel_residual
    return Block(
        module=module,
        attention=attention,
        mlp=Mlp(ff1=linear(module.mlp.dense_h_to_4h), ff2=linear(module.mlp.dense_4h_to_h)),
        residual_mid=None if parallel else Tap(module.post_attention_layernorm, End.INPUT),
    )
