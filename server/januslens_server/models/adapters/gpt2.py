"""GPT-2: learned positions, pre-LayerNorm, one fused Q|K|V projection, tied head.

Distinct points:
- linear maps are transformers' `Conv1D`, which stores `[d_in, d_out]`;
- `c_attn` holds query, key and value as three column blocks;
- the attention scale may be off (`scale_attn_weights`) or divided by the layer's number
  (`scale_attn_by_inverse_layer_idx`), which SDPA knows only where the module has a `scaling`.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from januslens_server.capture import End, Tap
from januslens_server.errors import ModelFailed
from januslens_server.graph.attention_pattern import Scoring
from januslens_server.models.adapters.parts import facts, layer_norm, lens, run_eagerly
from januslens_server.models.views import Attention, Block, Linear, Mlp, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `GPT2LMHeadModel`. Raises `ModelFailed` for variants with cross-attention."""
    config: Any = model.config
    if config.add_cross_attention:
        raise ModelFailed("expected a decoder-only GPT-2, got one with cross-attention")
    transformer: Any = model.transformer
    scaled_as_usual = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
    if not scaled_as_usual and not hasattr(transformer.h[0].attn, "scaling"):
        run_eagerly(model)
    return ModelView(
        embedding=transformer.wte,
        blocks=tuple(_block(i, module, config) for i, module in enumerate(transformer.h)),
        lens=lens(model, layer_norm(transformer.ln_f)),
        facts=facts(
            model, d_mlp=config.n_inner or 4 * config.n_embd, max_positions=config.n_positions
        ),
    )


def _scale(layer: int, config: Any) -> float:
    scale: float = (config.n_embd / config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


def _block(layer: int, module: Any, config: Any) -> Block:
    def fused(part: int) -> Linear:
        d_model = config.n_embd
        columns = range(part * d_model, (part + 1) * d_model)
        return Linear(module.attn.c_attn, stored_as_rows=True, columns=columns)

    attention = Attention(
        query=fused(0),
        key=fused(1),
        value=fused(2),
        output=Linear(module.attn.c_proj, stored_as_rows=True),
        n_heads=config.n_head,
        n_kv_heads=config.n_head,
        scoring=Scoring(scale=_scale(layer, config)),
    )
    mlp = Mlp(
        ff1=Linear(module.mlp.c_fc, stored_as_rows=True),
        ff2=Linear(module.mlp.c_proj, stored_as_rows=True),
    )
    return Block(
        module=module,
        attention=attention,
        mlp=mlp,
        residual_mid=Tap(module.ln_2, End.INPUT),
    )
