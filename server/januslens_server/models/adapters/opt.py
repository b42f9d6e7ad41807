"""OPT: GPT-2's block with separate projections and learned positions.

Distinct points:
- where embeddings are narrower than the blocks (`word_embed_proj_dim`), `project_out` stands
  between the final norm and the head: it is a part of the unembedding;
- the query is scaled before the dot product, which for the probabilities is the same;
- the MLP gets its inputs without a batch axis;
- refused: norms behind the residual sum (`do_layer_norm_before` off, OPT-350m), where no vector
  is the sum of what the sublayers wrote, and checkpoints without a final norm.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from januslens_server.capture import End, Tap
from januslens_server.errors import ModelFailed
from januslens_server.graph.attention_pattern import Scoring
from januslens_server.lens.head import LensHead
from januslens_server.lens.unembedding import Unembedding
from januslens_server.models.adapters.parts import facts, layer_norm, linear
from januslens_server.models.views import Attention, Block, Mlp, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map an `OPTForCausalLM`. Raises `ModelFailed` for post-norms and for no final norm."""
    config: Any = model.config
    decoder: Any = model.model.decoder
    if not config.do_layer_norm_before or decoder.final_layer_norm is None:
        raise ModelFailed(
            "expected an OPT with norms before its sublayers and a final norm, got "
            f"do_layer_norm_before={config.do_layer_norm_before} and "
            f"_remove_final_layer_norm={config._remove_final_layer_norm}"  # noqa: SLF001
        )
    return ModelView(
        embedding=decoder.embed_tokens,
        blocks=tuple(_block(module, config) for module in decoder.layers),
        lens=_lens(model, decoder),
        facts=facts(model, d_mlp=config.ffn_dim, max_positions=config.max_position_embeddings),
    )


def _lens(model: PreTrainedModel, decoder: Any) -> LensHead:
    head: Any = model.get_output_embeddings()
    weight = head.weight.detach()
    if decoder.project_out is not None:
        weight = weight.float() @ decoder.project_out.weight.detach().float()
    return LensHead(layer_norm(decoder.final_layer_norm, weight.device), Unembedding(weight))


def _block(module: Any, config: Any) -> Block:
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
