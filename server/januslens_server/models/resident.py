"""A model that is loaded and ready to be analysed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from januslens_server.lens.row_cache import RowCache
from januslens_server.models.experts import Experts
from januslens_server.models.neuron_index import NeuronIndex
from januslens_server.models.tensor_cache import TensorCache
from januslens_server.models.tokenizer import Vocabulary
from januslens_server.models.views import ModelView
from januslens_server.results import ModelFacts, Provenance

# Logits of weight rows that are kept for later traces, in bytes of the CPU's memory.
ROW_CACHE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class ResidentModel:
    """The weights (frozen, in evaluation mode), their parts, tokenizer and provenance.

    `cache` is where the next server finds what is computed once per model. `row_cache_bytes` of
    logits are kept for traces that meet the same rows of the weights again.
    """

    name: str
    network: PreTrainedModel
    view: ModelView
    vocabulary: Vocabulary
    provenance: Provenance
    cache: TensorCache | None = None
    row_cache_bytes: int = ROW_CACHE_BYTES

    @cached_property
    def neurons(self) -> NeuronIndex:
        """What the neurons write, read layer by layer when it is asked for."""
        return NeuronIndex(self.view, self.provenance, self.cache)

    @cached_property
    def rows(self) -> RowCache:
        """Rows of the weights as the lens reads them, those met last."""
        return RowCache(self.view.lens, self.row_cache_bytes, _weight_rows(self.view.facts))

    @property
    def row_cache_growth(self) -> int:
        """Bytes by which `rows` may still grow; does not make them."""
        made: RowCache | None = vars(self).get("rows")
        if made is not None:
            return made.growth
        facts = self.view.facts
        return min(self.row_cache_bytes, 4 * facts.vocab_size * _weight_rows(facts))

    @property
    def device(self) -> torch.device:
        """Where prompts go and the lens computes."""
        return self.view.lens.unembedding.device


def _weight_rows(facts: ModelFacts) -> int:
    """Rows that depend on no input: keys, up columns and values of neurons, rows of W_O, biases."""
    neurons = 3 * facts.d_mlp * max(1, facts.n_experts)
    return facts.n_layers * (neurons + facts.n_heads * facts.d_head + 2)


@dataclass(frozen=True)
class CostSizes:
    """`facts` with experts as one token meets them, weights of all blocks that it passes, bytes.

    `facts.n_experts` is how many experts a token is routed to; 0 for dense models. `item` is the
    size of an activation's element, `block` the largest block's number of weights,
    `chunk_bytes` what is held of logits at once.
    """

    facts: ModelFacts
    passed: int
    block: int
    item: int
    eager: bool
    chunk_bytes: int


def cost_sizes(model: ResidentModel) -> CostSizes:
    """Counted from the parameters' shapes; reads no weights."""
    facts, network = model.view.facts, model.network
    configuration: Any = network.config.get_text_config()
    routed = min(facts.n_experts, getattr(configuration, "num_experts_per_tok", facts.n_experts))
    passed = largest = 0
    for block in model.view.blocks:
        whole = sum(p.numel() for p in block.module.parameters())
        experts = 0
        if isinstance(block.mlp, Experts):
            experts = sum(p.numel() for p in block.mlp.module.parameters())
        passed += whole - experts + experts * routed // max(1, facts.n_experts)
        largest = max(largest, whole)
    return CostSizes(
        facts=replace(facts, n_experts=routed),
        passed=passed,
        block=largest,
        item=torch.empty(0, dtype=network.dtype).element_size(),
        eager=model.provenance.attention == "eager",
        chunk_bytes=model.view.lens.chunk_bytes,
    )
