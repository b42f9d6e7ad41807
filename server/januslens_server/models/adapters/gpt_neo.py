"""GPT-Neo: GPT-2's block with separate projections, unscaled attention and local layers.

Distinct points:
- attention scores are not divided by sqrt(d_head);
- every `local` layer attends to the last `window_size` positions only, itself included;
- query, key and value have no bias, the output projection has one.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from januslens_server.capture import End, Tap
from januslens_server.graph.attention_pattern import Scoring
from januslens_server.models.adapters.parts import facts, layer_norm, lens, linear
from januslens_server.models.views import Attention, Block, Mlp, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `GPTNeoForCausalLM`."""
    config: Any = model.config
    transformer: Any = model.transformer
    return ModelView(
        embedding=transformer.wte,
        blocks=tuple(_block(module, config) for module in transformer.h),
        lens=lens(model, layer_norm(transformer.ln_f)),
        facts=facts(
            model,
            d_mlp=config.intermediate_size or 4 * config.hidden_size,
            max_positions=config.max_position_embeddings,
        ),
    )


def _block(module: Any, config: Any) -> Block:
    attn = module.attn.attention
    attention = Attention(
        query=linear(attn.q_proj),
        key=linear(attn.k_proj),
        value=linear(attn.v_proj),
        output=linear(attn.out_proj),
        n_heads=config.num_heads,
        n_kv_heads=config.num_heads,
        scoring=Scoring(
            scale=1.0, window=config.window_size if attn.attention_type == "local" else None
        ),
    )
    return Block(
        module=module,
        attention=attention,
        mlp=Mlp(ff1=linear(module.mlp.c_fc), ff2=linear(module.mlp.c_proj)),
        residual_mid=Tap(module.ln_2, End.INPUT),
    )
