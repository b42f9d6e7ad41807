"""What a model must hold before it is served, measured on its own weights when it is loaded."""

from __future__ import annotations

from collections import defaultdict

import torch

from januslens_server.models.resident import ResidentModel
from januslens_server.models.runner import forward
from januslens_server.pipelines.trace import trace
from januslens_server.results import Guarantee, LayerGraph, NodeKind, TraceHeader, TraceSummary
from januslens_server.specs import TraceSpec

PROMPT_LENGTH = 8

# Relative errors; half types round every activation that the model passes on.
LENS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}
SHARE_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}


def self_check(model: ResidentModel) -> list[Guarantee]:
    """Measure a model that was just loaded; every guarantee must hold for it to be served."""
    data_type = model.provenance.data_type
    ids = _prompt(model)
    return [
        Guarantee("last lens = logits", lens_error(model, ids), LENS_TOLERANCE[data_type]),
        Guarantee("parts sum to wholes", shares_error(model, ids), SHARE_TOLERANCE[data_type]),
        Guarantee(
            "contributions sum to logit", contribution_error(model, ids), SHARE_TOLERANCE[data_type]
        ),
    ]


def _prompt(model: ResidentModel) -> tuple[int, ...]:
    """Token ids spread over the vocabulary: no text is typical of every model."""
    facts = model.view.facts
    length = min(PROMPT_LENGTH, facts.max_positions)
    return tuple(facts.vocab_size * (2 * i + 1) // (2 * length) for i in range(length))


@torch.inference_mode()
def lens_error(model: ResidentModel, ids: tuple[int, ...]) -> float:
    """Largest difference of the last block's lens and the model's logits, relative to these."""
    tokens = torch.tensor([ids], device=model.device)
    logits = model.network(input_ids=tokens, use_cache=False).logits[0].float()
    residual = forward(model, ids, (), lambda: None).residual
    lens = model.view.lens
    read = lens.cap(lens.logits(lens.final_norm(residual)))
    return float((read - logits).abs().max() / logits.abs().max())


def shares_error(model: ResidentModel, ids: tuple[int, ...]) -> float:
    """Largest distance from 1 of the shares into a sum, over all layers and positions."""
    totals: defaultdict[str, float] = defaultdict(float)
    for event in trace(model, TraceSpec(ids, all_positions=True), lambda: None):
        if isinstance(event, LayerGraph):
            for edge in event.edges:
                if edge.share is not None:
                    totals[edge.target] += edge.share
    return max(abs(total - 1) for total in totals.values())


def contribution_error(model: ResidentModel, ids: tuple[int, ...]) -> float:
    """Distance of all logit contributions' sum from the target's logit, relative to its size.

    The parts are block 0's input and what every attention and MLP adds (docs/semantics.md).
    """
    spec = TraceSpec(ids, include_logit_contribution=True)
    summed = logit = 0.0
    for event in trace(model, spec, lambda: None):
        if isinstance(event, TraceHeader):
            logit = event.targets[0].target_logit
        elif isinstance(event, TraceSummary):
            summed += event.constant_logit_contribution or 0.0
        else:
            summed += sum(
                edge.logit_contribution or 0.0
                for edge in event.edges
                if _adds_to_residual(edge.source)
            )
    return abs(summed - logit) / max(abs(logit), 1.0)


def _adds_to_residual(node_id: str) -> bool:
    """Whether it is a term of the last residual: no OTHER of such a term's own sum."""
    *place, kind = node_id.split("/")
    adds = kind in {"BLOCK_INPUT", "ATTENTION_OUTPUT", "MLP_OUTPUT"}
    return adds and NodeKind.OTHER.name not in place
