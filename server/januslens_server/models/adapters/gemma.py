"""Gemma, Gemma 2 and Gemma 3: scaled embeddings, norms that multiply by 1 + weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from januslens_server.errors import ModelFailed
from januslens_server.graph.weights import HeadMap, HeadNorm
from januslens_server.lens.head import LensHead
from januslens_server.lens.norm import Norm
from januslens_server.models.adapters.llama import (
    Layer,
    attention,
    llama_like,
    post_norm_block,
    pre_norm_block,
)
from januslens_server.models.adapters.modules import lens, norm_tap, rotation, run_eagerly
from januslens_server.models.views import Block, ModelView


def gemma(model: PreTrainedModel) -> ModelView:
    """Gemma: Llama's block with scaled embeddings and norms that store their weight minus 1.

    Distinct points:
    - RMSNorm multiplies by `1 + weight`, in Gemma 2 and 3 as well;
    - embeddings are multiplied by sqrt(d_model) before the first block;
    - `d_head` is a separate setting; the output head is tied;
    - refused: bidirectional attention, where positions attend to later ones.

    Raises `ModelFailed` for bidirectional attention.
    """
    refuse_bidirectional(model.config)
    decoder: Any = model.model
    return llama_like(model, _gemma_block, lens(model, gemma_norm(decoder.norm)))


def refuse_bidirectional(config: Any) -> None:
    """Raise `ModelFailed` if positions attend to later ones."""
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelFailed(
            f"the attention of this {config.model_type} is bidirectional: expected causal attention"
        )


def gemma_norm(module: Any) -> Norm:
    """Map an RMSNorm that multiplies by `1 + weight`."""
    return Norm(1 + module.weight.detach().float(), None, module.eps, centred=False)


def gemma_head_map(module: Any) -> HeadMap:
    """Map an RMSNorm over each head's queries or keys that multiplies by `1 + weight`."""
    return HeadMap(norm=HeadNorm(1 + module.weight.detach().float(), module.eps))


def _gemma_block(layer: Layer) -> Block:
    return pre_norm_block(layer, attention(layer))


def gemma2(model: PreTrainedModel) -> ModelView:
    """Gemma 2: Gemma's block with a norm before and after each sublayer, and soft-caps.

    Distinct points:
    - post-norms stand between each sublayer and the residual;
    - attention scores and logits are soft-capped;
    - SDPA does not soft-cap scores, so eager attention replaces it where transformers allows SDPA;
    - scores are scaled by `query_pre_attn_scalar`, not by d_head;
    - `layer_types` determines which layers use the sliding window.

    Raises `ModelFailed` for bidirectional attention.
    """
    config: Any = model.config
    refuse_bidirectional(config)
    if config.attn_logit_softcapping is not None:
        run_eagerly(model)
    decoder: Any = model.model
    head = lens(model, gemma_norm(decoder.norm), soft_cap=config.final_logit_softcapping)
    return llama_like(model, _gemma2_block, head)


def _gemma2_block(layer: Layer) -> Block:
    soft_cap = layer.config.attn_logit_softcapping
    attending = attention(layer, window=layer.window, soft_cap=soft_cap)
    return post_norm_block(layer, attending, gemma_norm, pre_norms=True)


def gemma3_text(model: PreTrainedModel) -> ModelView:
    """Gemma 3: Gemma 2's pre- and post-norms, with query and key norms and two rotations.

    Distinct points:
    - Gemma's RMSNorm over each head of queries and keys precedes the rotation;
    - sliding layers use a local rotation, full layers a global one;
    - attention scores have no soft-cap, even if the configuration sets one; logits may have one.

    Raises `ModelFailed` for bidirectional attention.
    """
    decoder: Any = model.model
    head = lens(model, gemma_norm(decoder.norm), soft_cap=decoder.config.final_logit_softcapping)
    return _gemma3(model, decoder, head)


def gemma3(model: PreTrainedModel) -> ModelView:
    """Gemma 3 with a vision tower: its text decoder, whose logits have no soft-cap.

    Text alone does not pass through the vision tower.

    Raises `ModelFailed` for bidirectional attention.
    """
    whole: Any = model.model
    return _gemma3(model, whole.language_model, lens(model, gemma_norm(whole.language_model.norm)))


def _gemma3(model: PreTrainedModel, decoder: Any, head: LensHead) -> ModelView:
    config = decoder.config
    refuse_bidirectional(config)
    rotations = {kind: rotation(decoder, layer_type=kind) for kind in set(config.layer_types)}

    def block(layer: Layer) -> Block:
        attn = layer.module.self_attn
        normed = replace(
            attention(layer, window=layer.window),
            rotation=rotations[config.layer_types[layer.number]],
            query_map=gemma_head_map(attn.q_norm),
            key_map=gemma_head_map(attn.k_norm),
            query_norm=norm_tap(attn.q_norm, heads_first=True),
            key_norm=norm_tap(attn.k_norm, heads_first=True),
        )
        return post_norm_block(layer, normed, gemma_norm, pre_norms=True)

    return llama_like(model, block, head, decoder=decoder)
