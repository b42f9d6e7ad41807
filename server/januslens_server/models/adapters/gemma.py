"""Gemma: Llama's block with scaled embeddings and norms that store their weight less one.

Distinct points:
- RMSNorm multiplies by `1 + weight`; Gemma 2 and 3 have the same norm, also of queries and keys;
- embeddings are multiplied by sqrt(d_model) before the first block;
- `d_head` is a setting of its own; the head is tied;
- models with bidirectional attention are refused: their early positions see later ones.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from januslens_server.errors import ModelFailed
from januslens_server.graph.head_map import HeadMap, HeadNorm
from januslens_server.lens.norm import Norm
from januslens_server.models.adapters.llama_like import Layer, attention, llama_like, pre_norm_block
from januslens_server.models.adapters.parts import lens
from januslens_server.models.views import Block, ModelView


def view(model: PreTrainedModel) -> ModelView:
    """Map a `GemmaForCausalLM`. Raises `ModelFailed` for bidirectional attention."""
    refuse_bidirectional(model.config)
    decoder: Any = model.model
    return llama_like(model, _block, lens(model, gemma_norm(decoder.norm)))


def refuse_bidirectional(config: Any) -> None:
    """Raise `ModelFailed` unless every position attends to earlier ones only."""
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelFailed(
            f"expected a {config.model_type} with causal attention, got bidirectional attention"
        )


def gemma_norm(module: Any) -> Norm:
    """An RMSNorm that multiplies by `1 + weight`."""
    return Norm(1 + module.weight.detach().float(), None, module.eps, centred=False)


def gemma_head_map(module: Any) -> HeadMap:
    """The same norm over each head's queries or keys."""
    return HeadMap(norm=HeadNorm(1 + module.weight.detach().float(), module.eps))


def _block(layer: Layer) -> Block:
    return pre_norm_block(layer, attention(layer))
