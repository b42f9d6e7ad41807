"""Check a model on its own weights before it is served.

In half precision, rounding can hide a missing part of a block. So each block also runs in float32,
with a copy of its weights and the same inputs as in the model's own pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from januslens_server.capture import LayerActivations, StreamActivations, capturing
from januslens_server.errors import ModelFailed, NotFinite, never_cancelled
from januslens_server.models.adapters.observed_modules import with_modules
from januslens_server.models.graph_inputs import (
    block_weights,
    layer_activations,
    layer_taps,
    mixer_weights,
    stream_activations,
)
from januslens_server.models.matrices import loaded_weights
from januslens_server.models.resident import ResidentModel
from januslens_server.models.views import Block, CoarseBlock
from januslens_server.pipelines.resolve import resolve_trace
from januslens_server.pipelines.trace import trace
from januslens_server.results import Guarantee, Level, ModelFacts, NodeKind, TraceSummary
from januslens_server.specs import LensSpec, TraceSpec

PROMPT_LENGTH = 8


def self_check(model: ResidentModel) -> Sequence[Guarantee]:
    """Trace a short prompt at every position, and return the results of all checks.

    The checks cover every node. Only the predictions are projected, because with a large
    vocabulary, projecting all nodes would take most of the time until the model is ready.

    Raises `ModelFailed` if the model overflows on the prompt.
    """
    spec = TraceSpec(
        prompt=_prompt(model.view.facts),
        all_positions=True,
        lens=LensSpec(top_k=0, bottom_k=0),
        node_kinds=frozenset({NodeKind.PREDICTION}),
        include_logit_contribution=True,
        include_checks=True,
    )
    try:
        *_, summary = trace(resolve_trace(model, spec), never_cancelled)
        errors = block_errors(model, _prompt(model.view.facts))
    except NotFinite as error:
        advice = f"; {error.model_advice}" if error.model_advice else ""
        raise ModelFailed(f"self-check failed: {error.problem}{advice}") from error
    checks = summary.checks if isinstance(summary, TraceSummary) else ()
    return [*checks, *([Guarantee(NAME, max(errors.values()), TOLERANCE)] if errors else [])]


def checked(model: ResidentModel) -> tuple[ResidentModel, Sequence[Guarantee]]:
    """Check a model; if a check fails, show less of layers, and check again.

    These are the layers whose parts or sublayers do not add up in float32, or all layers if that is
    not the reason. Instead of its parts, the sublayers of a layer are shown; instead of those, only
    the residual stream. If a check fails again, its result says so.
    """
    guarantees = self_check(model)
    broken = [guarantee for guarantee in guarantees if not guarantee.held]
    view = model.view
    shown = [found.layer for found in view.levels if found.level is not Level.STREAM]
    if not broken or not shown:
        return model, guarantees
    errors = block_errors(model, _prompt(view.facts))
    wrong = [layer for layer, error in errors.items() if not error <= TOLERANCE] or shown
    reason = "; ".join(guarantee.failure for guarantee in broken)
    coarse = view.coarsened(dict.fromkeys(wrong, reason))
    lowered = with_modules(model.network, coarse, [i for i in wrong if i in view.known])
    return checked(replace(model, view=lowered))


def _prompt(facts: ModelFacts) -> tuple[int, ...]:
    """Return token ids spread over the vocabulary, because no text is typical of all models."""
    length = min(PROMPT_LENGTH, facts.max_positions)
    return tuple(facts.vocab_size * (2 * i + 1) // (2 * length) for i in range(length))


NAME = "blocks add their parts, in float32"
TOLERANCE = 1e-4

# Maximum rounding error of two additions to the residual stream, relative to its norm.
ROUNDING = 64 * torch.finfo(torch.float32).eps


@torch.inference_mode()
def block_errors(model: ResidentModel, ids: Sequence[int]) -> dict[int, float]:
    """Measure by layer how much a block adds to the residual beyond what its sublayers do.

    An error is the largest norm of this part at any position, relative to the norms of the
    sublayers' outputs. Layers without known sublayers have none. Needs memory for a float32 copy of
    one block.
    """
    levels = model.view.levels
    blocks = {i: model.view.blocks[i] for i, level, *_ in levels if level is not Level.STREAM}
    if not blocks:
        return {}
    calls: dict[int, tuple[Any, Any]] = {}
    with ExitStack() as hooks:
        for i, block in blocks.items():
            handle = block.module.register_forward_pre_hook(_recorder(i, calls), with_kwargs=True)
            hooks.callback(handle.remove)
        model.network(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    return {i: _error(block, *calls[i], length=len(ids)) for i, block in blocks.items()}


def _recorder(layer: int, calls: dict[int, tuple[Any, Any]]) -> Any:
    def record(_module: nn.Module, args: Any, named: Any) -> None:
        calls[layer] = (_as_float32(args), _as_float32(named))

    return record


def _as_float32(value: Any) -> Any:
    """Return arguments with every floating-point tensor converted to float32."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_as_float32(each) for each in value)
    if isinstance(value, dict):
        return {name: _as_float32(each) for name, each in value.items()}
    return value


def _error(block: Block | CoarseBlock, args: Any, named: Any, *, length: int) -> float:
    with _float32_weights(block.module):
        with capturing(layer_taps(block)) as captured:
            block.module(*args, **named)
        if isinstance(block, CoarseBlock):
            stream = stream_activations(block, captured)
            before, after = [*stream.before_mid.values()], [*stream.after_mid.values()]
            output = stream.block_output / stream.multiplier
            errors = [_residual_error(stream.block_input, before + after, output)]
            if stream.residual_mid is not None:
                errors += [_residual_error(stream.block_input, before, stream.residual_mid)]
            return max(*errors, _mixer_error(block, stream))
        acts = layer_activations(block, captured, length)
        added = [] if block.attention is None else [acts.attention_output]
        added += [] if block.mlp is None else [acts.mlp_output]
        added += [] if acts.mixer_output is None else [acts.mixer_output]
        residual = _residual_error(acts.block_input, added, acts.block_output / block.multiplier)
        return max(residual, _sums_error(block, acts, length))


def _residual_error(
    before: torch.Tensor, added: Sequence[torch.Tensor], after: torch.Tensor
) -> float:
    """Return how far `[pos, d_model]` vectors are from what is added between two residuals."""
    sizes = torch.stack([vector.norm(dim=-1) for vector in added]).sum(0)
    stream = before.norm(dim=-1) + after.norm(dim=-1)
    gap = after - before - torch.stack(list(added)).sum(0)
    beyond_rounding = (gap.norm(dim=-1) - ROUNDING * stream).clamp(min=0)
    return float((beyond_rounding / sizes.clamp(min=1e-30)).max())


def _mixer_error(block: CoarseBlock, stream: StreamActivations) -> float:
    """Return the largest relative error of the sum of a mixer's heads at any position."""
    weights, results = mixer_weights(block), stream.mixer_heads
    if weights is None or results is None:
        return 0.0
    heads = results @ weights.output.flatten(0, 1)
    if weights.bias is not None:
        heads = heads + weights.bias
    added = {**stream.before_mid, **stream.after_mid}["mixer_output"]
    return float(((heads - added).norm(dim=-1) / added.norm(dim=-1).clamp(min=1e-30)).max())


def _sums_error(block: Block, acts: LayerActivations, length: int) -> float:
    """Return the largest relative error of the sums of heads and of neurons at any position."""
    weights = block_weights(block)
    pairs = []
    if weights.attention is not None:
        heads = acts.attention_concat @ weights.attention.output.flatten(0, 1)
        if weights.attention.bias is not None:
            heads = heads + weights.attention.bias
        attention = acts.attention_output if acts.attention_sum is None else acts.attention_sum
        pairs.append((heads, attention))
    if weights.mlp is not None:
        whole = acts.mlp_output if acts.mlp_sum is None else acts.mlp_sum
        neurons = []
        for position in range(length):
            terms = weights.mlp.row(acts, position).terms
            total = terms.activations @ terms.rows
            neurons.append(total if terms.bias is None else total + terms.bias)
        pairs.append((torch.stack(neurons), whole))
    errors = [
        ((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)).max()
        for found, expected in pairs
    ]
    return float(torch.stack(errors).max())


@contextmanager
def _float32_weights(module: nn.Module) -> Iterator[None]:
    """Convert a module's tensors to float32 inside the context; restore them afterwards."""
    with ExitStack() as stack:
        for each in module.modules():
            stack.enter_context(loaded_weights(each))
        tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
        own = [tensor.data for tensor in tensors]
        for tensor in tensors:
            tensor.data = tensor.data.float()
        try:
            yield
        finally:
            for tensor, data in zip(tensors, own, strict=True):
                tensor.data = data
