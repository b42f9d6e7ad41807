"""A model that is loaded and ready to be analysed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from januslens_server.lens.head import LensHead
from januslens_server.lens.projection import CACHED_BYTES
from januslens_server.lens.row_cache import ROWS, RowCache
from januslens_server.models.experts import Experts
from januslens_server.models.neuron_index import NeuronIndex
from januslens_server.models.scans import Scan, scan_of
from januslens_server.models.site_taps import SiteTap, block_taps
from januslens_server.models.tensor_cache import TensorCache
from januslens_server.models.tokenizer import Vocabulary
from januslens_server.models.views import Block, CoarseBlock, ModelView
from januslens_server.results import ModelFacts, Provenance
from januslens_server.specs import Site

# Bytes of logits of weight rows that are cached for later traces, on the CPU.
ROW_CACHE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class ResidentModel:
    """A loaded model: weights (frozen, in evaluation mode), view, vocabulary and provenance.

    `cache` stores tensors that are computed once per model, for later servers. `row_cache_bytes` is
    the maximum size of `rows`. A generation ends after a token of `end_ids`.
    """

    name: str
    network: PreTrainedModel
    view: ModelView
    vocabulary: Vocabulary
    provenance: Provenance
    cache: TensorCache | None = None
    row_cache_bytes: int = ROW_CACHE_BYTES
    end_ids: frozenset[int] = frozenset()

    @cached_property
    def neurons(self) -> NeuronIndex:
        """Index of the tokens that neurons promote. A layer is computed when it is first needed."""
        return NeuronIndex(self.view, self.provenance, self.cache)

    @cached_property
    def site_taps(self) -> list[dict[Site, SiteTap]]:
        """Taps of each layer's sites, created once, because a request may use them often."""
        return [block_taps(block, self.view.facts.stream_width) for block in self.view.blocks]

    @cached_property
    def rows(self) -> RowCache:
        """Cache of the logits of the weight rows that are used most often."""
        return RowCache(self.view.lens, self.row_cache_bytes, _weight_rows(self.view))

    @property
    def row_cache_growth(self) -> int:
        """Bytes by which `rows` may still grow. Does not create the cache."""
        made: RowCache | None = vars(self).get("rows")
        if made is not None:
            return made.growth
        return min(self.row_cache_bytes, 4 * self.view.facts.vocab_size * _weight_rows(self.view))

    @property
    def device(self) -> torch.device:
        """Device of the model's inputs and of the lens."""
        return self.view.lens.unembedding.device


def _weight_rows(view: ModelView) -> int:
    """Number of weight rows that traces project: keys, up columns, values, rows of W_O, biases."""
    facts = view.facts
    return facts.n_layers * (3 * view.n_neurons + facts.n_heads * facts.d_head + 2)


@dataclass(frozen=True)
class CostSizes:
    """Sizes of a model that determine a request's cost.

    Attributes:
        facts: The model's sizes, with `n_experts` as the experts per token; 0 for dense models.
            Shared experts and wider dense layers count as several.
        passed: Number of weights in all blocks that one token uses.
        block: Number of weights of the largest block.
        widest: Largest width of a matrix in a block without known parts; 0 if there is none.
        scans: Scans of all mixers.
        item: Bytes of an element of an activation.
        eager: Whether attention is computed eagerly, with a matrix of scores.
        chunk_bytes: Bytes of logits that are computed at once.
        part_bytes: Bytes of logits whose figures are computed at once, on all cores together.
    """

    facts: ModelFacts
    passed: int
    block: int
    widest: int
    scans: tuple[Scan, ...]
    item: int
    eager: bool
    chunk_bytes: int
    part_bytes: int


def cost_sizes(model: ResidentModel) -> CostSizes:
    """Compute the sizes from the parameters' shapes, without reading weights."""
    facts, network = model.view.facts, model.network
    configuration: Any = network.config.get_text_config()
    routed = min(facts.n_experts, getattr(configuration, "num_experts_per_tok", facts.n_experts))
    passed = largest = widest = per_token = 0
    for block in model.view.blocks:
        whole = sum(p.numel() for p in block.module.parameters())
        experts = 0
        if isinstance(block, Block) and isinstance(block.mlp, Experts):
            experts = sum(p.numel() for p in block.mlp.module.parameters())
            per_token = max(per_token, routed * block.mlp.width + block.mlp.n_shared)
        elif isinstance(block, Block) and block.mlp is not None and facts.n_experts:
            per_token = max(per_token, block.mlp.n_neurons)
        passed += whole - experts + experts * routed // max(1, facts.n_experts)
        largest = max(largest, whole)
        if isinstance(block, CoarseBlock):
            matrices = (p for p in block.module.parameters() if p.dim() > 1)
            widest = max(widest, *(max(p.shape[-2:]) for p in matrices))
    mixed = [b for b in model.view.blocks if isinstance(b, CoarseBlock) or b.beside]
    scans = [scan_of(module) for block in mixed for module in block.module.modules()]
    return CostSizes(
        facts=replace(facts, n_experts=math.ceil(per_token / max(1, facts.d_mlp))),
        passed=passed,
        block=largest,
        widest=widest,
        scans=tuple(scan for scan in scans if scan is not None),
        item=torch.empty(0, dtype=network.dtype).element_size(),
        eager=model.provenance.attention == "eager",
        chunk_bytes=model.view.lens.chunk_bytes,
        part_bytes=_part_bytes(model.view.lens),
    )


def _part_bytes(lens: LensHead) -> int:
    """Return the bytes of the parts of a chunk whose figures are computed at once.

    A GPU computes those of the whole chunk. The row cache computes those of `ROWS` rows on a core.
    """
    if lens.unembedding.device.type != "cpu":
        return lens.chunk_bytes
    row = torch.float32.itemsize * lens.unembedding.vocab
    return max(torch.get_num_threads() * max(CACHED_BYTES, row), ROWS * row)
