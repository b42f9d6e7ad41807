"""The heads of linear attention and state spaces, compared with plain Hugging Face models.

Their results are the inputs of the mixer's output map, side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from januslens_server.errors import InvalidRequest
from januslens_server.pipelines.cost import demand_of
from januslens_server.pipelines.resolve import resolve_trace
from januslens_server.pipelines.trace import trace
from januslens_server.results import Edge, EdgeKind, LayerGraph, NodeKind
from januslens_server.specs import (
    Criterion,
    InterventionSpec,
    LensSpec,
    Scale,
    Selection,
    Site,
    TraceSpec,
    Unit,
)
from tests.architectures.cases import Case
from tests.architectures.test_levels import FALCON_H1, MAMBA, QWEN3_NEXT, close, served
from tests.architectures.test_sublayers import GRANITE_HYBRID, NEMOTRON_H
from tests.architectures.tiny_models import plain


@dataclass(frozen=True)
class Mixer:
    """A mixer in layer 0: its name, that of its output map, its heads, and the block's factor."""

    name: str
    output: str
    heads: int
    factor: float = 1.0


# The map has a bias, and the block multiplies what it returns.
BIASED = Case(
    "granitemoehybrid",
    "mixer with a bias",
    dict(GRANITE_HYBRID.settings) | {"mamba_proj_bias": True},
)
KIMI = Case(
    "kimi_linear",
    "delta attention",
    {
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "linear_head_dim": 8,
        "linear_num_heads": 3,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "dense"],
    },
)
MAMBA2 = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2}
MIXERS = {
    QWEN3_NEXT: Mixer("linear_attn", "out_proj", 4),
    NEMOTRON_H: Mixer("mixer", "out_proj", 4),
    BIASED: Mixer("mamba", "out_proj", 8, 0.4),
    KIMI: Mixer("self_attn", "o_proj", 3),
}
every_case = pytest.mark.parametrize("case", MIXERS, ids=lambda case: case.id)
ALL = Selection(heads=0)


def layer_zero(case: Case) -> Any:
    """The first block of the plain model."""
    network = plain(case)
    lists = (m for m in network.modules() if isinstance(m, torch.nn.ModuleList))
    count = network.config.num_hidden_layers
    return network, next(each for each in lists if len(each) == count)[0]


def results_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """What the plain model's output map reads `[pos, n_heads, d_head]` and what the mixer returns.

    The last tensor is the gradient of the last position's largest logit with respect to the latter.
    """
    mixer, (network, block) = MIXERS[case], layer_zero(case)
    found: dict[str, Tensor] = {}
    module = block.get_submodule(mixer.name)

    def before(_module: Any, args: tuple[Tensor, ...]) -> None:
        found["heads"] = args[0]

    def after(_module: Any, _args: Any, output: Any) -> None:
        found["added"] = output if isinstance(output, Tensor) else output[0]

    handles = [
        module.get_submodule(mixer.output).register_forward_pre_hook(before),
        module.register_forward_hook(after),
    ]
    try:
        logits = network(torch.tensor([case.prompt]), use_cache=False).logits[0, -1]
        (gradient,) = torch.autograd.grad(logits.max(), found["added"])
    finally:
        for handle in handles:
            handle.remove()
    heads = found["heads"][0].detach().unflatten(-1, (mixer.heads, -1))
    return heads, found["added"][0].detach(), gradient[0]


def outputs_of(case: Case) -> Tensor:
    """The vectors of all heads `[pos, n_heads, d_model]`."""
    mixer, (_, block) = MIXERS[case], layer_zero(case)
    heads, _, _ = results_of(case)
    weight = block.get_submodule(f"{mixer.name}.{mixer.output}").weight.detach()
    blocks = weight.split(heads.shape[-1], dim=1)  # the columns that read each head
    each = [heads[:, h] @ columns.T for h, columns in enumerate(blocks)]
    return mixer.factor * torch.stack(each, dim=1)


def layer(case: Case, **named: Any) -> tuple[dict[str, Tensor], list[Edge]]:
    """The vectors of layer 0 by node, and the parts of its mixer's result at every position."""
    spec = TraceSpec(
        tuple(case.prompt),
        layers=(0,),
        all_positions=True,
        lens=LensSpec(top_k=0, bottom_k=0),
        include_vectors=True,
        include_attribution=True,
        include_logit_contribution=True,
        **named,
    )
    vectors: dict[str, Tensor] = {}
    parts: list[Edge] = []
    for graph in trace(resolve_trace(served(case), spec), lambda: None):
        if isinstance(graph, LayerGraph):
            assert graph.vectors is not None
            ids = [node.id for node in graph.nodes]
            vectors |= dict(zip(ids, map(torch.as_tensor, graph.vectors), strict=True))
            parts += [
                edge
                for edge in graph.edges
                if edge.kind is EdgeKind.PART and edge.target.endswith("MIXER_OUTPUT")
            ]
    return vectors, parts


@cache
def whole(case: Case) -> tuple[dict[str, Tensor], list[Edge]]:
    return layer(case, selection=ALL)


def total_shares(parts: list[Edge]) -> dict[str, float]:
    found: dict[str, float] = {}
    for edge in parts:
        found[edge.target] = found.get(edge.target, 0.0) + float(edge.share or 0.0)
    return found


@every_case
def test_heads_are_blocks_of_the_output_maps_input(case: Case) -> None:
    vectors, parts = whole(case)
    outputs = outputs_of(case)
    _, added, gradient = results_of(case)
    attributions = {edge.source: edge.attribution for edge in parts}
    for position, by_head in enumerate(outputs):
        rest = MIXERS[case].factor * added[position] - by_head.sum(0)
        for head, vector in enumerate(by_head):
            node = f"L0/p{position}/MIXER_HEAD/h{head}"
            close(vectors[node], vector)
            expected = float(gradient[position] @ vector) / MIXERS[case].factor
            assert attributions[node] == pytest.approx(expected, rel=1e-3, abs=1e-4)
        bias = vectors.get(f"L0/p{position}/OTHER/MIXER_OUTPUT")
        assert (bias is not None) == (case is BIASED)
        close(torch.zeros_like(rest) if bias is None else bias, rest)
    shares = total_shares(parts)
    assert len(shares) == len(case.prompt)
    assert all(total == pytest.approx(1, abs=1e-4) for total in shares.values())


@every_case
def test_a_heads_decay_changes_its_own_columns_only(case: Case) -> None:
    """The columns are in the order of the heads; a norm over several heads scales the others."""
    mixer, (_, block) = MIXERS[case], layer_zero(case)
    before, _, _ = results_of(case)
    named = block.get_submodule(mixer.name).named_parameters()
    (decay,) = (weights for name, weights in named if name.endswith("A_log"))
    changed = decay.data.reshape(mixer.heads, -1)[1]
    kept = changed.clone()
    changed += 2.0
    try:
        after, _, _ = results_of(case)
    finally:
        changed.copy_(kept)
    for head in range(mixer.heads):
        turned = 1 - torch.cosine_similarity(before[-1, head], after[-1, head], dim=0)
        assert (float(turned) > 1e-4) == (head == 1)


@pytest.mark.parametrize("by", list(Criterion), ids=lambda by: by.name)
def test_heads_are_selected_by_the_requests_score(by: Criterion) -> None:
    case = BIASED
    vectors, parts = layer(case, selection=Selection(heads=3, by=by))
    _, every = whole(case)
    heads, _, _ = results_of(case)
    scores = {
        Criterion.CONTRIBUTION: {edge.source: edge.logit_contribution for edge in every},
        Criterion.ATTRIBUTION: {edge.source: edge.attribution for edge in every},
    }
    for position, outputs in enumerate(outputs_of(case)):
        ids = [f"L0/p{position}/MIXER_HEAD/h{head}" for head in range(8)]
        norms = dict(zip(ids, heads[position].norm(dim=-1).tolist(), strict=True))
        found = scores.get(by, norms)
        expected = sorted(ids, key=lambda node: -float(found[node] or 0.0))[:3]
        assert {node for node in ids if node in vectors} == set(expected)
        left = [head for head, node in enumerate(ids) if node not in expected]
        bias = whole(case)[0][f"L0/p{position}/OTHER/MIXER_OUTPUT"]
        close(vectors[f"L0/p{position}/OTHER/MIXER_OUTPUT"], outputs[left].sum(0) + bias)
    assert all(total == pytest.approx(1, abs=1e-4) for total in total_shares(parts).values())


@pytest.mark.parametrize("heads", [0, 3])
def test_estimate_counts_the_heads(heads: int) -> None:
    kinds = frozenset({NodeKind.MIXER_HEAD, NodeKind.MIXER_OUTPUT, NodeKind.OTHER})
    spec = TraceSpec(
        tuple(BIASED.prompt),
        layers=(0,),
        all_positions=True,
        selection=Selection(heads=heads),
        node_kinds=kinds,
    )
    request = resolve_trace(served(BIASED), spec)
    graphs = trace(request, lambda: None)
    nodes = sum(len(graph.nodes) for graph in graphs if isinstance(graph, LayerGraph))
    shown = (heads or 8) + 2  # with the mixer's result and OTHER
    assert nodes == shown * len(BIASED.prompt)
    replaced = 2  # OTHER of replaced residuals, which the estimate includes
    assert demand_of(request).nodes == (shown + replaced) * len(BIASED.prompt)


def test_other_is_what_an_intervention_put_in_place_of_the_heads() -> None:
    change = InterventionSpec(Site.MIXER_OUTPUT, Scale(3.0), layers=(0,), positions=(1,))
    vectors, parts = layer(QWEN3_NEXT, selection=ALL, interventions=(change,))
    heads = outputs_of(QWEN3_NEXT)[1].sum(0)
    close(vectors["L0/p1/MIXER_OUTPUT"], 3 * heads)
    close(vectors["L0/p1/OTHER/MIXER_OUTPUT"], 2 * heads)
    assert all(total == pytest.approx(1, abs=1e-4) for total in total_shares(parts).values())


def test_named_heads_are_those_of_attention() -> None:
    named = Selection(only_heads=(Unit(1, 0),))
    vectors, parts = layer(QWEN3_NEXT, selection=named)
    assert "L0/p0/MIXER_OUTPUT" in vectors
    assert not parts
    with pytest.raises(InvalidRequest, match="only the residual stream and"):
        layer(QWEN3_NEXT, selection=Selection(only_heads=(Unit(0, 0),)))


def test_mixers_without_known_heads_are_refused() -> None:
    """Mamba's channels have no heads; beside attention, a mixer is one node."""
    kinds = frozenset({NodeKind.MIXER_HEAD, NodeKind.MIXER_OUTPUT})
    with pytest.raises(InvalidRequest, match="MIXER_HEAD is unknown"):
        layer(MAMBA, node_kinds=kinds)
    vectors, parts = layer(FALCON_H1, node_kinds=kinds)
    assert not parts
    assert {node.split("/")[-1] for node in vectors} == {"MIXER_OUTPUT"}
