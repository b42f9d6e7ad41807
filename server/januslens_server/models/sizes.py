"""The sizes of a model that a request's cost follows from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from januslens_server.models.experts import Experts
from januslens_server.models.resident import ResidentModel
from januslens_server.results import ModelFacts


@dataclass(frozen=True)
class ModelSizes:
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


def model_sizes(model: ResidentModel) -> ModelSizes:
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
    return ModelSizes(
        facts=replace(facts, n_experts=routed),
        passed=passed,
        block=largest,
        item=torch.empty(0, dtype=network.dtype).element_size(),
        eager=model.provenance.attention == "eager",
        chunk_bytes=model.view.lens.chunk_bytes,
    )
