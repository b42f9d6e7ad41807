"""A whole decoder read by its structure; what is found is proven by the self-check or refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from januslens_server.capture import Rotation
from januslens_server.errors import ModelFailed
from januslens_server.lens.head import LensHead
from januslens_server.lens.unembedding import Unembedding
from januslens_server.models.automatic.block import BlockFinder, Settings
from januslens_server.models.automatic.norms import is_norm, read_norm
from januslens_server.models.automatic.pairing import best_reading, pairings
from januslens_server.models.automatic.probe import Probe, run_probe, same_memory
from januslens_server.models.views import Block, ModelView
from januslens_server.results import MatrixKind, ModelFacts


def view(model: PreTrainedModel) -> ModelView:
    """The parts of a decoder-only model that has no adapter.

    Looks for: a list of equal blocks as long as the configuration says; in each, three linear
    maps with one input (query, key, value), one that joins the heads, and two or three of an
    MLP; norms by what they do; one rotary embedding. Raises `ModelFailed` naming what is missing.
    Which rotary pairs turn together is found by which gives the model's own attention.
    """
    config: Any = model.config.get_text_config()
    embedding = _linear_ends(model.get_input_embeddings(), "input embedding")
    head = _linear_ends(model.get_output_embeddings(), "output embedding")
    name, modules = _blocks(model, config.num_hidden_layers)
    probe = run_probe(model)
    settings = _settings(config)
    rotations = _rotations(model)
    blocks = []
    for i, module in enumerate(modules):
        finder = BlockFinder(f"{name}.{i}", module, probe)
        readings = [
            finder.block(settings, rotation, window)
            for window in _windows(config, module, i)
            for rotation in rotations
        ]
        blocks.append(best_reading(model, i, readings))
    return ModelView(
        embedding=embedding,
        blocks=tuple(blocks),
        lens=_lens(config, head, probe, modules[-1]),
        facts=_facts(config, settings, blocks[0], embedding, head),
    )


def _settings(config: Any) -> Settings:
    n_heads: int = config.num_attention_heads
    return Settings(
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        soft_cap=getattr(config, "attn_logit_softcapping", None),
        residual_multiplier=float(getattr(config, "residual_multiplier", None) or 1.0),
    )


def _facts(config: Any, settings: Settings, first: Block, embedding: Any, head: Any) -> ModelFacts:
    query, ff2 = first.matrices[MatrixKind.Q], first.matrices[MatrixKind.FF2]
    return ModelFacts(
        n_layers=config.num_hidden_layers,
        n_heads=settings.n_heads,
        n_kv_heads=settings.n_kv_heads,
        d_model=embedding.weight.shape[1],
        d_head=query.rows_of(query.parameter()).shape[1] // settings.n_heads,
        d_mlp=ff2.rows_of(ff2.parameter()).shape[0],
        n_experts=0,
        vocab_size=head.weight.shape[0],
        max_positions=config.max_position_embeddings,
    )


def _linear_ends(module: Any, what: str) -> Any:
    """The embedding at either end of the model."""
    if not isinstance(module, nn.Embedding | nn.Linear):
        raise ModelFailed(f"expected an {what}, got {type(module).__name__}")
    return module


def _blocks(model: PreTrainedModel, n_layers: int) -> tuple[str, list[nn.Module]]:
    """The one list of `n_layers` modules of one class, and its name."""
    lists = [
        (name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == n_layers
        and len({type(block) for block in module}) == 1
    ]
    if len(lists) != 1:
        raise ModelFailed(f"expected one list of {n_layers} equal blocks, found {len(lists)}")
    return lists[0]


def _windows(config: Any, block: nn.Module, layer: int) -> list[int | None]:
    """How far the layer may attend, the likeliest first: a probe shorter than it cannot tell."""
    size = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    own = [getattr(module, "sliding_window", None) for module in block.modules()]
    if kinds is not None:
        likely = size if kinds[layer] == "sliding_attention" else None
    else:
        likely = next((window for window in own if window is not None), size)
    return [likely, *({size, None} - {likely})]


def _rotations(model: PreTrainedModel) -> list[Callable[[int], Rotation] | None]:
    """The readings of the model's rotary embedding, and none at all: some layers do not turn."""
    found = [module for module in model.modules() if hasattr(module, "inv_freq")]
    if len(found) > 1:
        raise ModelFailed(f"expected at most one rotary embedding, found {len(found)}")
    if not found:
        return [None]
    rotary: Any = found[0]

    def rotation(reading: int, length: int) -> Rotation:
        positions = torch.arange(length, device=rotary.inv_freq.device)[None]
        cos, sin = rotary(torch.empty(0, device=rotary.inv_freq.device), positions)
        return pairings(cos[0], sin[0])[reading]

    return [None, *(partial(rotation, reading) for reading in range(3))]


def _lens(config: Any, head: Any, probe: Probe, last_block: nn.Module) -> LensHead:
    """The norm that takes the last block's output, and the head with its multiplier and cap."""
    block = probe.of(last_block)
    norms = [
        event
        for event in probe.events
        if is_norm(event.module) and block is not None and same_memory(event.input, block.output)
    ]
    if len(norms) != 1:
        raise ModelFailed(f"expected one norm after the last block, found {len(norms)}")
    bias = None if head.bias is None else head.bias.detach().float()
    return LensHead(
        final_norm=read_norm(norms[0]),
        unembedding=Unembedding(head.weight),
        bias=bias,
        logit_scale=_logit_scale(config),
        soft_cap=getattr(config, "final_logit_softcapping", None),
    )


def _logit_scale(config: Any) -> float:
    """What families multiply or divide their logits by."""
    if getattr(config, "logits_scaling", None):
        return 1 / float(config.logits_scaling)
    return float(getattr(config, "logit_scale", None) or 1.0)
