"""What sublayers add, compared with plain Hugging Face models whose modules are hooked.

The modules and the factors of their outputs are those of transformers' code for each family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from januslens_server.errors import InvalidRequest
from januslens_server.graph.block_flow import SUBLAYER_KINDS
from januslens_server.pipelines.activations import activations
from januslens_server.pipelines.cost import demand_of
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.resolve import (
    resolve_activations,
    resolve_gradient_lens,
    resolve_trace,
)
from januslens_server.pipelines.trace import trace
from januslens_server.results import (
    Edge,
    EdgeKind,
    GradientHeader,
    GradientMatrix,
    LayerGraph,
    Level,
    MatrixKind,
    NodeKind,
    Side,
    SiteValues,
    SublayerKind,
)
from januslens_server.specs import (
    ActivationsSpec,
    GradientLensSpec,
    InterventionSpec,
    LensSpec,
    NegativeLogLikelihood,
    Site,
    TraceSpec,
    Zero,
)
from tests.architectures.cases import COMBINED, LLAMA4, Case
from tests.architectures.test_levels import FALCON_H1, MAMBA, OPT, QWEN3_NEXT, close, served
from tests.architectures.tiny_models import plain

ATTENTION, MIXER, MLP = (
    NodeKind.ATTENTION_OUTPUT,
    NodeKind.MIXER_OUTPUT,
    NodeKind.MLP_OUTPUT,
)


@dataclass(frozen=True)
class Added:
    """The modules that make up a node's vector, each with a factor; `mid` reads RESIDUAL_MID."""

    layer: int
    modules: Mapping[NodeKind, Mapping[str, float]]
    mid: str | None
    kinds: tuple[SublayerKind, ...]


GRANITE_HYBRID = Case(
    "granitemoehybrid",
    "two MLPs",
    {
        "num_key_value_heads": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        "residual_multiplier": 0.4,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
)
NEMOTRON_H = Case(
    "nemotron_h",
    "one sublayer",
    {
        "layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"],
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "mtp_layers_block_type": [],
    },
)
LATENT = Case(
    "deepseek_v3",
    "latent",
    {
        "q_lora_rank": 12,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 6,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 2,
    },
)
STATE_SPACE, LINEAR = SublayerKind.STATE_SPACE, SublayerKind.LINEAR_ATTENTION
SUBLAYERS: dict[Case, Added] = {
    MAMBA: Added(0, {MIXER: {"mixer": 1.0}}, None, (STATE_SPACE,)),
    QWEN3_NEXT: Added(
        0,
        {MIXER: {"linear_attn": 1.0}, MLP: {"mlp": 1.0}},
        "post_attention_layernorm",
        (LINEAR, SublayerKind.EXPERTS),
    ),
    FALCON_H1: Added(
        0,
        {ATTENTION: {"self_attn": 0.6}, MIXER: {"mamba": 0.3}, MLP: {"feed_forward": 1.0}},
        "pre_ff_layernorm",
        (STATE_SPACE, SublayerKind.ATTENTION, SublayerKind.MLP),
    ),
    GRANITE_HYBRID: Added(
        0,
        {MIXER: {"mamba": 0.4}, MLP: {"block_sparse_moe": 0.4, "shared_mlp": 0.4}},
        "post_attention_layernorm",
        (STATE_SPACE, SublayerKind.EXPERTS, SublayerKind.MLP),
    ),
    NEMOTRON_H: Added(0, {MIXER: {"mixer": 1.0}}, None, (STATE_SPACE,)),
}
every_case = pytest.mark.parametrize("case", SUBLAYERS, ids=lambda case: case.id)


def block_of(case: Case, network: Any) -> Any:
    count = network.config.num_hidden_layers
    lists = (m for m in network.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)
    return next(lists)[SUBLAYERS[case].layer if case in SUBLAYERS else 0]


def first(value: Any) -> Tensor:
    found: Tensor = value if isinstance(value, Tensor) else value[0]
    return found


@contextmanager
def hooked(case: Case, network: Any, change: Mapping[str, float]) -> Iterator[dict[str, Tensor]]:
    """Record what modules of the block return, times a number; also the input of `mid`."""
    found: dict[str, Tensor] = {}
    added, block = SUBLAYERS[case], block_of(case, network)

    def after(name: str) -> Any:
        def record(_module: Any, _args: Any, output: Any) -> Any:
            whole = first(output) * change.get(name, 1.0)
            found[name] = whole
            return whole if isinstance(output, Tensor) else (whole, *output[1:])

        return record

    def before(_module: Any, args: Any, named: Any) -> None:
        found["residual_mid"] = args[0] if args else named["hidden_states"]

    with ExitStack() as hooks:
        for name in (name for modules in added.modules.values() for name in modules):
            handle = block.get_submodule(name).register_forward_hook(after(name))
            hooks.callback(handle.remove)
        if added.mid:
            mid = block.get_submodule(added.mid)
            handle = mid.register_forward_pre_hook(before, with_kwargs=True)
            hooks.callback(handle.remove)
        yield found


def logits(network: Any, case: Case) -> Tensor:
    found: Tensor = network(torch.tensor([case.prompt]), use_cache=False).logits[0]
    return found


# Kinds that only other layers of these cases have, or parts of sublayers.
OUTSIDE = {NodeKind.OTHER, NodeKind.FINAL_NORM, NodeKind.PREDICTION}


class Traced(NamedTuple):
    """The traced layer at every position: vectors and gradient norms by node id, and its sums."""

    vectors: dict[str, Tensor]
    gradient_norms: dict[str, float]
    parts: list[Edge]


@cache
def traced(case: Case) -> Traced:
    spec = TraceSpec(
        tuple(case.prompt),
        layers=(SUBLAYERS[case].layer,),
        all_positions=True,
        lens=LensSpec(top_k=0, bottom_k=0),
        include_vectors=True,
        include_attribution=True,
        node_kinds=SUBLAYER_KINDS - OUTSIDE,
    )
    found = Traced({}, {}, [])
    for graph in trace(resolve_trace(served(case), spec), lambda: None):
        if not isinstance(graph, LayerGraph):
            continue
        assert graph.vectors is not None
        assert graph.gradients is not None
        columns = zip(graph.nodes, graph.vectors, graph.gradients.norms.tolist(), strict=True)
        for node, vector, norm in columns:
            found.vectors[node.id] = torch.as_tensor(vector)
            found.gradient_norms[node.id] = norm
        found.parts.extend(edge for edge in graph.edges if edge.kind is EdgeKind.PART)
    return found


@pytest.mark.parametrize(
    "case", [case for case in SUBLAYERS if case is not FALCON_H1], ids=lambda case: case.id
)
def test_level_names_sublayers_and_their_kinds(case: Case) -> None:
    added = SUBLAYERS[case]
    found = served(case).view.level(added.layer)
    assert found.level is Level.SUBLAYERS
    named = dict(found.sublayers)
    assert set(named) == {name for modules in added.modules.values() for name in modules}
    assert sorted(named.values()) == sorted(added.kinds)


@every_case
def test_nodes_are_what_the_plain_models_modules_add(case: Case) -> None:
    added, network = SUBLAYERS[case], plain(case)
    graph = traced(case)
    with torch.no_grad(), hooked(case, network, {}) as found:
        logits(network, case)
    expected = {
        kind: torch.stack([factor * found[name][0] for name, factor in modules.items()]).sum(0)
        for kind, modules in added.modules.items()
    }
    if added.mid:
        expected[NodeKind.RESIDUAL_MID] = found["residual_mid"][0]
    seen = {node.split("/")[-1] for node in graph.vectors}
    assert seen - {"BLOCK_INPUT", "BLOCK_OUTPUT"} == {kind.name for kind in expected}
    for kind, vectors in expected.items():
        for position in range(len(case.prompt)):
            node = f"L{added.layer}/p{position}/{kind.name}"
            close(graph.vectors[node], vectors[position])


@every_case
def test_parts_add_up_and_have_their_attribution(case: Case) -> None:
    """Attributions are gradients of the plain model's logit times what the modules add."""
    added, network = SUBLAYERS[case], plain(case)
    graph = traced(case)
    shares: dict[str, float] = {}
    for edge in graph.parts:
        shares[edge.target] = shares.get(edge.target, 0.0) + float(edge.share or 0.0)
    assert shares
    assert all(total == pytest.approx(1, abs=1e-5) for total in shares.values())
    with hooked(case, network, {}) as found:
        whole = logits(network, case)[-1]
    names = [name for modules in added.modules.values() for name in modules]
    outputs = [found[name] for name in names]
    found_gradients = torch.autograd.grad(whole.max(), outputs)
    gradients = {name: g[0] for name, g in zip(names, found_gradients, strict=True)}
    vectors = {name: found[name][0].detach() for name in names}
    attributions = {edge.source: edge.attribution for edge in graph.parts}
    for kind, modules in added.modules.items():
        for position in range(len(case.prompt)):
            node = f"L{added.layer}/p{position}/{kind.name}"
            products = [gradients[name][position] @ vectors[name][position] for name in modules]
            expected = float(torch.stack(products).sum())
            assert attributions[node] == pytest.approx(expected, rel=1e-3, abs=1e-4)
            name, factor = next(iter(modules.items()))
            gradient = float(gradients[name][position].norm()) / factor
            assert graph.gradient_norms[node] == pytest.approx(gradient, rel=1e-3, abs=1e-5)


@every_case
def test_removing_a_sublayer_changes_logits_as_in_the_plain_model(case: Case) -> None:
    added, network = SUBLAYERS[case], plain(case)
    for kind, modules in added.modules.items():
        change = InterventionSpec(Site[kind.name], Zero(), layers=(added.layer,))
        spec = ActivationsSpec(
            tuple(case.prompt), (Site.LOGITS,), float32=True, interventions=(change,)
        )
        if len(modules) > 1:  # no single tensor holds what several modules add
            continue
        (values,) = [
            event
            for event in activations(resolve_activations(served(case), spec), lambda: None)
            if isinstance(event, SiteValues)
        ]
        with torch.no_grad(), hooked(case, network, dict.fromkeys(modules, 0.0)):
            expected = logits(network, case)
        close(values.data.view(np.float32).reshape(values.shape), expected)


TARGET = 7
# The sides of linear maps in the residual basis, from transformers' code; None for neither.
SIDES: dict[Case, dict[str, Side | None]] = {
    MAMBA: {
        "mixer.in_proj": Side.INPUT,
        "mixer.x_proj": None,
        "mixer.out_proj": Side.VJP,
    },
    QWEN3_NEXT: {
        "linear_attn.in_proj_qkvz": Side.INPUT,
        "linear_attn.in_proj_ba": Side.INPUT,
        "linear_attn.out_proj": Side.VJP,
        "mlp.shared_expert.gate_proj": Side.INPUT,
        "mlp.shared_expert.up_proj": Side.INPUT,
        "mlp.shared_expert.down_proj": None,  # a gate multiplies its output by position
        "mlp.shared_expert_gate": Side.INPUT,
    },
    FALCON_H1: {
        "mamba.in_proj": Side.INPUT,
        "mamba.out_proj": Side.VJP,
        "self_attn.q_proj": Side.INPUT,
        "self_attn.k_proj": Side.INPUT,
        "self_attn.v_proj": Side.INPUT,
        "self_attn.o_proj": Side.VJP,
        "feed_forward.gate_proj": Side.INPUT,
        "feed_forward.up_proj": Side.INPUT,
        "feed_forward.down_proj": Side.VJP,
    },
    LATENT: {
        "self_attn.q_a_proj": Side.INPUT,
        "self_attn.q_b_proj": None,
        "self_attn.kv_a_proj_with_mqa": Side.INPUT,
        "self_attn.kv_b_proj": None,
        "self_attn.o_proj": Side.VJP,
        "mlp.gate_proj": Side.INPUT,
        "mlp.up_proj": Side.INPUT,
        "mlp.down_proj": Side.VJP,
    },
    LLAMA4[0]: {  # the router is a linear module that returns scores of its own
        "self_attn.q_proj": Side.INPUT,
        "self_attn.k_proj": Side.INPUT,
        "self_attn.v_proj": Side.INPUT,
        "self_attn.o_proj": Side.VJP,
        "feed_forward.shared_expert.gate_proj": Side.INPUT,
        "feed_forward.shared_expert.up_proj": Side.INPUT,
        "feed_forward.shared_expert.down_proj": None,
    },
}


@pytest.mark.parametrize("case", SIDES, ids=lambda case: case.id)
def test_factors_of_linear_maps_are_autograds_gradients_of_the_plain_model(case: Case) -> None:
    spec = GradientLensSpec(
        tuple(case.prompt),
        NegativeLogLikelihood((TARGET,)),
        modules=("*",),
        layers=(0,),
        components=0,
        include_factors=True,
    )
    events = list(gradient_lens(resolve_gradient_lens(served(case), spec), lambda: None))
    matrices = {event.module: event for event in events if isinstance(event, GradientMatrix)}
    assert {name: found.projected_side for name, found in matrices.items()} == SIDES[case]
    network = plain(case)
    block = block_of(case, network)
    names = list(matrices)
    weights = [block.get_submodule(name).weight for name in names]
    loss = -logits(network, case)[-1].log_softmax(-1)[TARGET]
    for name, expected in zip(names, torch.autograd.grad(loss, weights), strict=True):
        parts = matrices[name].components
        assert parts.inputs is not None
        assert parts.vjps is not None
        found = torch.as_tensor(parts.inputs).T @ torch.as_tensor(parts.vjps)
        error = (found - expected.T).norm() / expected.norm()
        assert float(error) < 1e-5, name
        assert matrices[name].kind is MatrixKind.MODULE
        shown = parts.projections.projected.tolist()
        assert any(shown) == (SIDES[case][name] is not None)


@pytest.mark.parametrize("case", [MAMBA, OPT], ids=lambda case: case.id)
def test_gradients_of_a_model_without_known_heads_have_a_cost(case: Case) -> None:
    spec = GradientLensSpec(
        tuple(case.prompt),
        NegativeLogLikelihood((TARGET,)),
        modules=("*",),
        include_attention_gradients=True,
    )
    demand = demand_of(resolve_gradient_lens(served(case), spec))
    assert demand.flops > 0
    assert demand.memory > 0


def test_gradients_of_an_indexers_maps_are_zero() -> None:
    case = next(case for case in COMBINED if case.family == "glm_moe_dsa")
    network = plain(case)
    network.zero_grad()
    (-logits(network, case)[-1].log_softmax(-1)[TARGET]).backward()
    assert network.model.layers[0].self_attn.indexer.wk.weight.grad is None
    spec = GradientLensSpec(tuple(case.prompt), NegativeLogLikelihood((TARGET,)), modules=("*",))
    found = gradient_lens(resolve_gradient_lens(served(case), spec), lambda: None)
    norms = {e.module: e.frobenius_norm for e in found if isinstance(e, GradientMatrix)}
    of_indexer = {
        name.rpartition(".")[2]: norm for name, norm in norms.items() if "indexer" in name
    }
    assert of_indexer == {"wq_b": 0, "wk": 0, "weights_proj": 0}
    assert norms["self_attn.o_proj"] > 0


def test_linear_maps_are_listed_and_named_by_patterns() -> None:
    model, prompt = served(QWEN3_NEXT), tuple(QWEN3_NEXT.prompt)
    (first_level, second) = model.view.levels
    assert {each.module for each in first_level.linear_maps} == set(SIDES[QWEN3_NEXT])
    assert "self_attn.q_proj" in {each.module for each in second.linear_maps}
    loss = NegativeLogLikelihood((TARGET,))
    both = GradientLensSpec(prompt, loss, modules=("linear_attn.out*", "self_attn.o_proj"))
    assert resolve_gradient_lens(model, both).matrices == [
        (1, "self_attn.o_proj"),
        (0, "linear_attn.out_proj"),
    ]
    with pytest.raises(InvalidRequest, match=r"modules\[0\]: none of .* such as linear_attn.in"):
        resolve_gradient_lens(model, GradientLensSpec(prompt, loss, modules=("q_proj",)))
    with pytest.raises(InvalidRequest, match="name the modules in `modules`"):
        resolve_gradient_lens(model, GradientLensSpec(prompt, loss, matrices=(MatrixKind.MODULE,)))
    with pytest.raises(InvalidRequest, match=r"expected modules such as mixer.in_proj"):
        resolve_gradient_lens(served(MAMBA), GradientLensSpec(prompt, loss))


def test_header_lists_layers_without_attention_gradients() -> None:
    for case, lacking in ((QWEN3_NEXT, (0,)), (LATENT, (0, 1))):
        spec = GradientLensSpec(
            tuple(case.prompt),
            NegativeLogLikelihood((TARGET,)),
            modules=("*",),
            include_attention_gradients=True,
        )
        header = next(iter(gradient_lens(resolve_gradient_lens(served(case), spec), lambda: None)))
        assert isinstance(header, GradientHeader)
        assert header.layers_without_attention_gradients == lacking
