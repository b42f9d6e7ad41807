"""GPT-2, GPT-Neo, GPT-J, GPT-NeoX and OPT."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from januslens_server.capture import End, Tap
from januslens_server.errors import ModelFailed
from januslens_server.graph.weights import Scoring
from januslens_server.lens.head import LensHead
from januslens_server.lens.unembedding import Unembedding
from januslens_server.models.adapters.modules import (
    by_head,
    facts,
    layer_norm,
    lens,
    linear,
    rotation,
    run_eagerly,
    table_rotation,
)
from januslens_server.models.matrices import Linear
from januslens_server.models.views import Attention, Block, Mlp, ModelView


def gpt2(model: PreTrainedModel) -> ModelView:
    """GPT-2: learned positions, pre-LayerNorm, one fused Q|K|V projection, tied head.

    Distinct points:
    - linear maps are transformers' `Conv1D`, which stores `[d_in, d_out]`;
    - `c_attn` holds query, key and value as three column blocks;
    - the attention scale may be off (`scale_attn_weights`) or divided by the layer's number
      (`scale_attn_by_inverse_layer_idx`), which SDPA applies only if the module has a `scaling`.

    Raises `ModelFailed` for variants with cross-attention.
    """
    config: Any = model.config
    if config.add_cross_attention:
        raise ModelFailed("this GPT-2 has cross-attention: expected a decoder-only model")
    transformer: Any = model.transformer
    scaled_as_usual = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
    if not scaled_as_usual and not hasattr(transformer.h[0].attn, "scaling"):
        run_eagerly(model)
    return ModelView(
        embedding=transformer.wte,
        blocks=tuple(_gpt2_block(i, module, config) for i, module in enumerate(transformer.h)),
        lens=lens(model, layer_norm(transformer.ln_f)),
        facts=facts(
            model, d_mlp=config.n_inner or 4 * config.n_embd, max_positions=config.n_positions
        ),
    )


def _gpt2_scale(layer: int, config: Any) -> float:
    scale: float = (config.n_embd / config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


def _gpt2_block(layer: int, module: Any, config: Any) -> Block:
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
        scoring=Scoring(scale=_gpt2_scale(layer, config)),
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


def gpt_neo(model: PreTrainedModel) -> ModelView:
    """GPT-Neo: GPT-2's block with separate projections, unscaled attention and local layers.

    Distinct points:
    - attention scores are not divided by sqrt(d_head);
    - a `local` layer attends to the last `window_size` positions, including the position itself;
    - query, key and value have no bias, the output projection has one.
    """
    config: Any = model.config
    transformer: Any = model.transformer
    return ModelView(
        embedding=transformer.wte,
        blocks=tuple(_gpt_neo_block(module, config) for module in transformer.h),
        lens=lens(model, layer_norm(transformer.ln_f)),
        facts=facts(
            model,
            d_mlp=config.intermediate_size or 4 * config.hidden_size,
            max_positions=config.max_position_embeddings,
        ),
    )


def _gpt_neo_block(module: Any, config: Any) -> Block:
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


def gptj(model: PreTrainedModel) -> ModelView:
    """GPT-J: attention and MLP in parallel on one LayerNorm, partial rotary positions.

    Distinct points:
    - no residual between attention and MLP: the block adds both at once;
    - the first `rotary_dim` dimensions of a head are rotated in neighbouring pairs; the table is in
      each attention module, from transformers 5.24 on in the model;
    - the output head has a bias; the projections of attention have none.
    """
    config: Any = model.config
    transformer: Any = model.transformer
    return ModelView(
        embedding=transformer.wte,
        blocks=tuple(_gptj_block(module, transformer, config) for module in transformer.h),
        lens=lens(model, layer_norm(transformer.ln_f)),
        facts=facts(
            model, d_mlp=config.n_inner or 4 * config.n_embd, max_positions=config.n_positions
        ),
    )


def _gptj_block(module: Any, transformer: Any, config: Any) -> Block:
    attention = Attention(
        query=linear(module.attn.q_proj),
        key=linear(module.attn.k_proj),
        value=linear(module.attn.v_proj),
        output=linear(module.attn.out_proj),
        n_heads=config.n_head,
        n_kv_heads=config.n_head,
        scoring=Scoring(scale=(config.n_embd // config.n_head) ** -0.5),
        rotation=table_rotation(getattr(transformer, "rotary_emb", module.attn)),
    )
    return Block(
        module=module,
        attention=attention,
        mlp=Mlp(ff1=linear(module.mlp.fc_in), ff2=linear(module.mlp.fc_out)),
        residual_mid=None,
    )


def gpt_neox(model: PreTrainedModel) -> ModelView:
    """GPT-NeoX (Pythia): attention and MLP in parallel on two norms, partial rotary positions.

    Distinct points:
    - attention and MLP are parallel, or sequential without `use_parallel_residual`; either way each
      has its own LayerNorm;
    - `query_key_value` holds query, key and value head by head;
    - the first `rotary_pct` of a head's dimensions are rotated, in pairs half that width apart.
    """
    config: Any = model.config
    decoder: Any = model.gpt_neox
    return ModelView(
        embedding=decoder.embed_in,
        blocks=tuple(_gpt_neox_block(module, config, decoder) for module in decoder.layers),
        lens=lens(model, layer_norm(decoder.final_layer_norm)),
        facts=facts(
            model, d_mlp=config.intermediate_size, max_positions=config.max_position_embeddings
        ),
    )


def _gpt_neox_block(module: Any, config: Any, decoder: Any) -> Block:
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


def opt(model: PreTrainedModel) -> ModelView:
    """OPT: GPT-2's block with separate projections and learned positions.

    Distinct points:
    - if embeddings are narrower than the blocks (`word_embed_proj_dim`), the unembedding includes
      `project_out`, which follows the final norm;
    - the query is scaled before the dot product, which gives the same probabilities;
    - the MLP's inputs have no batch axis;
    - refused: norms after the residual sum (`do_layer_norm_before` off, OPT-350m), where no vector
      is the sum of the sublayers' results, and checkpoints without a final norm.

    Raises `ModelFailed` for post-norms and for no final norm.
    """
    config: Any = model.config
    decoder: Any = model.model.decoder
    if not config.do_layer_norm_before or decoder.final_layer_norm is None:
        raise ModelFailed(
            f"do_layer_norm_before={config.do_layer_norm_before} and "
            f"_remove_final_layer_norm={config._remove_final_layer_norm}: "  # noqa: SLF001
            "expected an OPT with norms before its sublayers and a final norm"
        )
    return ModelView(
        embedding=decoder.embed_tokens,
        blocks=tuple(_opt_block(module, config) for module in decoder.layers),
        lens=_opt_lens(model, decoder),
        facts=facts(model, d_mlp=config.ffn_dim, max_positions=config.max_position_embeddings),
        normed=None if decoder.project_out is None else Tap(decoder.project_out, End.INPUT),
    )


def _opt_lens(model: PreTrainedModel, decoder: Any) -> LensHead:
    head: Any = model.get_output_embeddings()
    weight = head.weight.detach()
    if decoder.project_out is not None:
        weight = weight.float() @ decoder.project_out.weight.detach().float()
    return LensHead(layer_norm(decoder.final_layer_norm, weight.device), Unembedding(weight))


def _opt_block(module: Any, config: Any) -> Block:
    attn = module.self_attn
    attention = Attention(
        query=linear(attn.q_proj),
        key=linear(attn.k_proj),
        value=linear(attn.v_proj),
        output=linear(attn.out_proj),
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_attention_heads,
        scoring=Scoring(scale=attn.scaling),
    )
    return Block(
        module=module,
        attention=attention,
        mlp=Mlp(ff1=linear(module.fc1), ff2=linear(module.fc2)),
        residual_mid=Tap(module.final_layer_norm, End.INPUT),
    )
