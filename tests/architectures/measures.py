"""Measure the error of each guarantee for one case, against the plain Hugging Face model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from januslens_server.lens.backward_lens import Loss
from januslens_server.models.runner import backward, forward
from januslens_server.pipelines.resolve import resolve_trace
from januslens_server.pipelines.self_check import self_check
from januslens_server.pipelines.trace import trace
from januslens_server.results import (
    Edge,
    EdgeKind,
    Guarantee,
    LayerGraph,
    Node,
    NodeKind,
    PositionTarget,
    TraceHeader,
    TraceSummary,
)
from januslens_server.specs import LensSpec, Selection, TraceSpec
from tests.architectures import oracle
from tests.architectures.cases import Case
from tests.architectures.tiny_models import resident

EVERYTHING = Selection(heads=0, memory_values_per_head=0, top_neurons=0, bottom_neurons=0)
ADDED_TO_RESIDUAL = (
    NodeKind.BLOCK_INPUT,
    NodeKind.ATTENTION_OUTPUT,
    NodeKind.MLP_OUTPUT,
    NodeKind.MIXER_OUTPUT,
)


@dataclass(frozen=True)
class Traced:
    """A trace of a prompt with every node and edge."""

    nodes: Mapping[str, Node]
    vectors: Mapping[str, Tensor]
    activations: Mapping[str, float]
    edges: tuple[Edge, ...]
    targets: tuple[PositionTarget, ...]
    checks: tuple[Guarantee, ...]


@lru_cache(maxsize=1)
def traced(case: Case) -> Traced:
    spec = TraceSpec(
        prompt=tuple(case.prompt),
        all_positions=True,
        selection=EVERYTHING,
        lens=LensSpec(top_k=0, bottom_k=0),
        include_vectors=True,
        include_logit_contribution=True,
        include_checks=True,
    )
    header, *graphs, summary = trace(resolve_trace(resident(case), spec), _go_on)
    assert isinstance(header, TraceHeader)
    assert isinstance(summary, TraceSummary)
    nodes: dict[str, Node] = {}
    vectors: dict[str, Tensor] = {}
    activations: dict[str, float] = {}
    edges: list[Edge] = []
    for graph in graphs:
        assert isinstance(graph, LayerGraph)
        assert graph.vectors is not None
        for i, node in enumerate(graph.nodes):
            nodes[node.id] = node
            vectors[node.id] = torch.from_numpy(graph.vectors[i])
            activations[node.id] = float(graph.activations[i])
        edges += graph.edges
    return Traced(
        nodes, vectors, activations, tuple(edges), tuple(header.targets), tuple(summary.checks)
    )


def last_lens(case: Case) -> float:
    passed = forward(resident(case), case.prompt, [], _go_on)
    lens = resident(case).view.lens
    read = lens.cap(lens.logits(lens.final_norm(passed.residual)))
    return _relative(read, oracle.logits(case))


def shares(case: Case) -> float:
    graph = traced(case)
    totals: defaultdict[str, float] = defaultdict(float)
    for edge in graph.edges:
        if edge.share is not None:
            totals[edge.target] += edge.share
    own = max(abs(total - 1) for total in totals.values())
    return max(own, *(check.measured_error for check in graph.checks))


def sums(case: Case) -> float:
    """Measure how far the vectors of the parts, not only their shares, add up to the sum."""
    graph, multipliers = traced(case), oracle.multipliers(case)
    parts: defaultdict[str, list[Tensor]] = defaultdict(list)
    for edge in graph.edges:
        if edge.kind is EdgeKind.PART:
            factor, whole = _coefficient(graph, edge), graph.nodes[edge.target]
            if whole.kind is NodeKind.BLOCK_OUTPUT and whole.layer is not None:
                factor *= multipliers[whole.layer]
            parts[edge.target].append(factor * graph.vectors[edge.source])
    return max(
        _relative(torch.stack(vectors).sum(0), graph.vectors[whole])
        for whole, vectors in parts.items()
    )


def attention(case: Case) -> float:
    graph, expected = traced(case), oracle.attentions(case)
    found = [torch.zeros_like(layer) for layer in expected]
    for edge in graph.edges:
        if edge.kind is EdgeKind.ATTEND and edge.attention is not None:
            node = graph.nodes[edge.target]
            assert node.layer is not None
            found[node.layer][node.head, node.position, node.source_position] = edge.attention
    pairs = zip(found, expected, strict=True)
    return max(float((mine - theirs).abs().max()) for mine, theirs in pairs)


def pull_backs(case: Case) -> float:
    """Measure memory keys and head queries at two positions."""
    graph, layers = traced(case), oracle.queries_and_keys(case)
    found, expected = [], []
    for name, node in graph.nodes.items():
        if node.position not in {5, len(case.prompt) - 1} or node.head is None:
            continue
        assert node.layer is not None
        states = layers[node.layer]
        if node.kind is NodeKind.MEMORY_KEY and node.source_position is not None:
            expected.append(states.memory_key(node.head, node.position, node.source_position))
        elif node.kind is NodeKind.HEAD_QUERY:
            expected.append(states.head_query(node.head, node.position))
        else:
            continue
        found.append(graph.vectors[name])
    return _relative(torch.stack(found), torch.stack(expected))


def contributions(case: Case) -> float:
    graph, expected = traced(case), oracle.logits(case, capped=False)
    totals = {t.position: t.constant_logit_contribution for t in graph.targets}
    for edge in graph.edges:
        node = graph.nodes[edge.source]
        if edge.logit_contribution is not None and node.kind in ADDED_TO_RESIDUAL:
            totals[node.position] += edge.logit_contribution
    logits = torch.stack([expected[t.position, t.target_token_id] for t in graph.targets])
    return _relative(torch.tensor([totals[t.position] for t in graph.targets]), logits)


def factors(case: Case) -> float:
    model = resident(case)
    kinds = [(i, kind) for i, block in enumerate(model.view.blocks) for kind in block.matrices]
    passed = backward(model, case.prompt, Loss(2, _loss), kinds, _go_on)
    dense = oracle.gradients(case, _loss)
    name_of: dict[Tensor, str] = {
        parameter: name for name, parameter in model.network.named_parameters()
    }
    errors = []
    for (layer, kind, expert), found in passed.factors.items():
        matrix = model.view.matrix((layer, kind, expert))
        expected = matrix.rows_of(dense[name_of[matrix.parameter()]], expert)
        errors.append(float((found.inputs.T @ found.vjps - expected).norm() / expected.norm()))
    return max(errors)


def half_precision(case: Case) -> float:
    """Return the largest error of the self-check in bfloat16."""
    checks = self_check(resident(case, torch.bfloat16))
    return float(np.max([check.measured_error for check in checks]))


@dataclass(frozen=True)
class Measure:
    """A guarantee: its short name, description, measurement and tolerance."""

    name: str
    meaning: str
    error: Callable[[Case], float]
    tolerance: float


MEASURES = (
    Measure(
        "lens",
        "lens of the last block's output, compared with the plain model's logits; largest "
        "difference relative to the largest logit",
        last_lens,
        1e-5,
    ),
    Measure(
        "shares",
        "difference from 1 of the total share of the parts of each sum, at every layer and "
        "position, and the checks that the trace itself reports",
        shares,
        1e-5,
    ),
    Measure(
        "sums",
        "sum of the parts' vectors times their coefficients, compared with the vector of the "
        "sum; largest difference relative to the sum's largest entry",
        sums,
        1e-5,
    ),
    Measure(
        "attention",
        "probabilities recomputed from captured queries and keys, compared with the plain "
        "model's; largest difference",
        attention,
        1e-5,
    ),
    Measure(
        "pull-backs",
        "memory keys and head queries, compared with autograd's gradients of the plain model's "
        "dot products; largest difference relative to the largest entry",
        pull_backs,
        1e-5,
    ),
    Measure(
        "logit",
        "sum of all contributions and the constant, compared with the plain model's logit "
        "before the soft-cap; largest difference relative to the largest logit",
        contributions,
        1e-5,
    ),
    Measure(
        "factors",
        "sum of the factors' outer products, compared with autograd's dense gradient of the "
        "plain model, for every matrix of every layer; relative Frobenius norm of the "
        "difference",
        factors,
        1e-5,
    ),
    Measure(
        "bfloat16",
        "largest figure of the self-check at load, in bfloat16",
        half_precision,
        2e-2,
    ),
)


def _coefficient(graph: Traced, edge: Edge) -> float:
    """Factor of a node's vector in the sum: its activation, its probability, or 1."""
    activation = graph.activations[edge.source]
    if not np.isnan(activation):
        return activation
    return 1.0 if edge.attention is None else edge.attention


def _loss(logits: Tensor) -> Tensor:
    """Negative log-likelihood of two tokens at the last two positions."""
    return -logits[-2:].log_softmax(-1)[[0, 1], [7, 11]].sum()


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def _go_on() -> None:
    """A cancellation check that never cancels."""
