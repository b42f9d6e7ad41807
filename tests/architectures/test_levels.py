"""Blocks of unknown structure show their residual stream, compared with plain models."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from januslens_server.errors import InvalidRequest, ModelFailed
from januslens_server.graph.block_flow import STREAM_KINDS, SUBLAYER_KINDS
from januslens_server.models.adapters import automatic, stream, view_of
from januslens_server.models.decoding import Decoder
from januslens_server.models.lengths import attention_error
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.activations import activations
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.resolve import (
    resolve_activations,
    resolve_find_neurons,
    resolve_gradient_lens,
    resolve_trace,
)
from januslens_server.pipelines.self_check import checked
from januslens_server.pipelines.trace import trace
from januslens_server.results import (
    ActivationsHeader,
    GradientHeader,
    GradientMatrix,
    LayerGraph,
    Level,
    MatrixKind,
    NodeKind,
    SiteValues,
    SublayerKind,
    TraceHeader,
)
from januslens_server.specs import (
    ActivationsSpec,
    FindNeuronsSpec,
    GradientLensSpec,
    InterventionSpec,
    LensSpec,
    NegativeLogLikelihood,
    Scale,
    Selection,
    Site,
    TraceSpec,
    Unit,
)
from tests.architectures.cases import LATENT_WIDTHS, NEMOTRON_H, ROUTED, VOCABULARY, Case
from tests.architectures.tiny_models import plain, resident

HEADS = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
# As many heads of linear attention as of attention.
DELTA_NET = HEADS | {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = Case("mamba", "state space", {"state_size": 4, "time_step_rank": 4})
QWEN3_NEXT = Case(
    "qwen3_next",
    "linear attention",
    DELTA_NET | EXPERTS,
)
# Linear attention has four maps before its output; the last looks like a gate of heads.
QWEN3_5 = Case(
    "qwen3_5_text",
    "linear attention with as many heads",
    DELTA_NET,
)
OLMO_HYBRID = Case(
    "olmo_hybrid",
    "linear attention",
    {"num_key_value_heads": 2, "layer_types": ["linear_attention", "full_attention"]},
)
FALCON_H1 = Case(
    "falcon_h1",
    "both mixers",
    {
        "num_key_value_heads": 2,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "attention_out_multiplier": 0.6,
        "ssm_out_multiplier": 0.3,
    },
)
# Post-norms: what a block returns is a norm's result; there is no norm before the head.
OPT = Case("opt", "post-norms", {"do_layer_norm_before": False})
# The second layer attends to the keys and values of the first.
SHARED_KEYS = Case(
    "gemma4_text",
    "shared keys",
    HEADS
    | {
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 1,
        "layer_types": ["full_attention", "full_attention"],
    },
)
# Two attentions per block, which the configuration counts as two hidden layers.
LONGCAT = Case(
    "longcat_flash",
    "two attentions per block",
    LATENT_WIDTHS
    | {
        "num_layers": 2,
        "num_hidden_layers": 4,
        "head_dim": 4,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "n_routed_experts": 4,
        "moe_topk": 2,
        "zero_expert_num": 1,
    },
)
# The last blocks begin with a shared transformer, which also reads the embeddings.
ZAMBA = Case(
    "zamba",
    "shared transformer",
    {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
    },
)
# Caps of logits under other names.
RECURRENT_GEMMA = Case(
    "recurrent_gemma",
    "capped logits",
    {
        "num_key_value_heads": 1,
        "lru_width": 32,
        "attention_window_size": 3,
        "block_types": ["recurrent", "attention"],
        "logits_soft_cap": 2.0,
    },
)
XLSTM = Case("xlstm", "capped logits", {"num_heads": 4, "output_logit_soft_cap": 0.5})
# Several residual streams side by side, three before the batch and two behind the positions.
ALTUP = Case(
    "gemma3n_text",
    "three streams",
    HEADS
    | {
        "altup_num_inputs": 3,
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 0,
        "layer_types": ["full_attention", "full_attention"],
    },
)
HYPER = Case(
    "hy_v4",
    "two streams",
    LATENT_WIDTHS
    | {
        "hc_mult": 2,
        "mlp_layer_types": ["dense", "dense"],
        "index_n_heads": 2,
        "index_head_dim": 8,
    },
)
# Experts whose weights are one matrix, and attention beside its norms in a module of their own.
DBRX = Case(
    "dbrx",
    "experts in one matrix",
    {
        "attn_config": {"clip_qkv": 0.6, "kv_n_heads": 2, "rope_theta": 500.0},
        "d_model": 32,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
)
# The second layer has half as many heads as the first.
HEADS_BY_LAYER = Case(
    "dots3_note_text",
    "heads by layer",
    LATENT_WIDTHS
    | ROUTED
    | {
        "layer_types": ["indexed_attention", "sliding_attention"],
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 4,
        "mlp_layer_types": ["dense", "sparse"],
        "num_key_value_heads": 4,
        "sliding_window": 3,
    },
)
TOWER = {
    "hidden_size": 16,
    "image_size": 28,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "patch_size": 14,
}
BIDIRECTIONAL = {"use_bidirectional_attention": True, "num_key_value_heads": 1}
CASES = (
    MAMBA,
    QWEN3_NEXT,
    QWEN3_5,
    OLMO_HYBRID,
    SHARED_KEYS,
    OPT,
    LONGCAT,
    ZAMBA,
    RECURRENT_GEMMA,
    XLSTM,
    DBRX,
    ALTUP,
    HYPER,
)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@cache
def served(case: Case) -> ResidentModel:
    model, guarantees = checked(resident(case))
    assert all(guarantee.measured_error < 1e-5 for guarantee in guarantees), guarantees
    return model


def stream_of(case: Case, scale: float | None = None) -> tuple[list[Tensor], Tensor]:
    """The residual stream before and after each block, and the logits, from the plain model.

    With a `scale`, the first block's output at position 2 is multiplied by it.
    """
    network, found = plain(case), []
    n_layers = case.settings.get("num_layers", case.settings.get("num_hidden_layers", 2))
    blocks = next(
        module
        for module in network.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers
    )

    def first(_module: Any, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        found.append(args[0] if args else named["hidden_states"])

    def each(module: Any, _args: Any, output: Any) -> Any:
        whole = output if isinstance(output, Tensor) else output[0]
        if scale is not None and module is blocks[0]:
            whole = whole.clone()
            at = (slice(None), slice(None), 2) if whole.shape[1] == 1 else (0, 2)
            whole[at] *= scale
        found.append(whole)
        return whole if isinstance(output, Tensor) else (whole, *output[1:])

    handles = [blocks[0].register_forward_pre_hook(first, with_kwargs=True)]
    handles += [block.register_forward_hook(each) for block in blocks]
    try:
        with torch.no_grad():
            logits = network(torch.tensor([case.prompt]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return [side_by_side(tensor, len(case.prompt)) for tensor in found], logits


def side_by_side(passed: Tensor, length: int) -> Tensor:
    """Return what a block passes on as `[pos, width]`, with several streams one after the other."""
    if passed.dim() == 4:
        streams = passed[:, 0].unbind() if passed.shape[1:3] == (1, length) else passed[0].unbind(1)
        return torch.cat(streams, dim=-1)
    return passed.reshape(length, -1)


def graphs(case: Case, **named: Any) -> tuple[TraceHeader, list[LayerGraph]]:
    spec = TraceSpec(tuple(case.prompt), all_positions=True, lens=LensSpec(top_k=1), **named)
    header, *found, _ = trace(resolve_trace(served(case), spec), lambda: None)
    assert isinstance(header, TraceHeader)
    return header, [graph for graph in found if isinstance(graph, LayerGraph)]


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-4, atol=1e-4)


def test_levels_say_which_layers_show_less_and_why() -> None:
    for hybrid in (QWEN3_NEXT, QWEN3_5, OLMO_HYBRID):
        levels = served(hybrid).view.levels
        assert [found.level for found in levels] == [Level.SUBLAYERS, Level.PARTS]
    first, second = served(SHARED_KEYS).view.levels
    assert (first.level, second.level) == (Level.PARTS, Level.SUBLAYERS)
    assert dict(second.sublayers)["self_attn"] is SublayerKind.ATTENTION
    assert {found.level for found in served(OPT).view.levels} == {Level.STREAM}
    assert "returns the result of final_layer_norm" in served(OPT).view.levels[0].reason
    assert levels[0].reason.startswith("linear_attn is linear attention: only the parts of")
    for found in served(MAMBA).view.levels:
        assert found.reason.startswith("mixer is a state space: only the parts of")
    assert "do_layer_norm_before" in served(OPT).view.levels[0].reason
    assert served(MAMBA).view.facts.n_heads == 0


def test_block_that_cannot_be_read_leaves_the_others_their_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(block: Any, *args: Any) -> float:
        if block.module is network.model.layers[0]:
            raise RuntimeError("sizes differ")
        return attention_error(block, *args)

    network: Any = resident(Case("seed_oss", "readable", HEADS)).network
    monkeypatch.setattr(f"{automatic.__name__}.attention_error", broken)
    first, *others = view_of(network).levels
    assert first.level is Level.SUBLAYERS
    assert first.reason.startswith("the structure of seed_oss is unknown: sizes differ")
    assert {found.level for found in others} == {Level.PARTS}


@every_case
def test_nodes_are_the_plain_models_residual_stream(case: Case) -> None:
    expected, logits = stream_of(case)
    header, found = graphs(case, include_vectors=True, include_logit_contribution=True)
    levels = {found.layer: found.level for found in header.limited_layers}
    limited = {layer for layer, level in levels.items() if level is Level.STREAM}
    assert levels
    for graph in found:
        assert graph.vectors is not None
        for node, vector in zip(graph.nodes, graph.vectors, strict=True):
            if node.kind is NodeKind.BLOCK_INPUT:
                close(vector, expected[0][node.position])
            elif node.kind is NodeKind.BLOCK_OUTPUT:
                close(vector, expected[graph.layer + 1][node.position])
            elif node.kind is NodeKind.OTHER and graph.layer in limited:
                added = expected[graph.layer + 1] - expected[graph.layer]
                close(vector, added[node.position])
        kinds = {node.kind for node in graph.nodes}
        sublayers = SUBLAYER_KINDS | {NodeKind.MIXER_HEAD}
        shown = {Level.STREAM: STREAM_KINDS, Level.SUBLAYERS: sublayers}
        if graph.layer in levels:
            assert kinds <= shown[levels[graph.layer]]
    for target in header.targets:
        assert target.predicted_token_id == int(logits[target.position].argmax())
        assert target.target_logit == pytest.approx(float(logits[target.position].max()), abs=1e-4)


@every_case
def test_activations_and_interventions_are_those_of_the_plain_model(case: Case) -> None:
    expected, logits = stream_of(case, scale=3.0)
    change = InterventionSpec(Site.BLOCK_OUTPUT, Scale(3.0), layers=(0,), positions=(2,))
    spec = ActivationsSpec(
        tuple(case.prompt),
        (Site.EMBEDDING, Site.BLOCK_OUTPUT, Site.LOGITS),
        float32=True,
        interventions=(change,),
    )
    for event in activations(resolve_activations(served(case), spec), lambda: None):
        if isinstance(event, SiteValues):
            values = event.data.view(np.float32).reshape(event.shape)
            whole = {Site.EMBEDDING: expected[0], Site.LOGITS: logits}
            close(values, whole.get(Site(event.site), expected[1 + (event.layer or 0)]))


@every_case
def test_generation_continues_like_whole_passes(case: Case) -> None:
    model, ids = served(case), list(case.prompt)
    decoder = Decoder(model, (0, 1), lambda: None)
    fed = ids
    for _ in range(4):
        logits, outputs = decoder.feed(fed)
        with torch.no_grad():
            whole = plain(case)(torch.tensor([ids]), use_cache=False).logits[0, -1]
        close(logits, whole)
        assert outputs.shape == (2, model.view.facts.stream_width)
        fed = [int(whole.argmax())]
        ids = ids + fed


def test_default_selection_reports_the_layers_that_lack_it() -> None:
    model, prompt = served(OLMO_HYBRID), tuple(OLMO_HYBRID.prompt)
    read = ActivationsSpec(prompt, (Site.HEAD_RESULT,))
    header, *values, _ = activations(resolve_activations(model, read), lambda: None)
    assert isinstance(header, ActivationsHeader)
    assert [level.layer for level in header.limited_layers] == [0]
    assert {v.layer for v in values if isinstance(v, SiteValues)} == {1}
    spec = GradientLensSpec(prompt, NegativeLogLikelihood((7,)))
    first, *matrices, _ = gradient_lens(resolve_gradient_lens(model, spec), lambda: None)
    assert isinstance(first, GradientHeader)
    assert [level.layer for level in first.limited_layers] == [0]
    assert {m.layer for m in matrices if isinstance(m, GradientMatrix)} == {1}
    found = resolve_find_neurons(model, FindNeuronsSpec((7,), False, (), 0, 5))
    assert found.layers == (1,)
    assert [level.layer for level in found.limited_layers] == [0]


def test_named_part_that_a_layer_lacks_is_refused_with_what_it_has() -> None:
    model, prompt = served(OLMO_HYBRID), tuple(OLMO_HYBRID.prompt)
    kinds = frozenset({NodeKind.HEAD_OUTPUT})
    with pytest.raises(
        InvalidRequest, match="HEAD_OUTPUT is unknown: only the residual stream and"
    ):
        resolve_trace(model, TraceSpec(prompt, layers=(0,), node_kinds=kinds))
    with pytest.raises(InvalidRequest, match=r"layer 0 .* has no QUERY; expected one of RES"):
        resolve_activations(model, ActivationsSpec(prompt, (Site.QUERY,), layers=(0,)))
    with pytest.raises(InvalidRequest, match="none of these layers has FF2"):
        resolve_gradient_lens(
            model,
            GradientLensSpec(
                prompt, NegativeLogLikelihood((7,)), matrices=(MatrixKind.FF2,), layers=(0,)
            ),
        )
    with pytest.raises(InvalidRequest, match=r"only the residual stream and .* shown of layer 0"):
        resolve_find_neurons(model, FindNeuronsSpec((7,), False, (0,), 0, 5))
    with pytest.raises(InvalidRequest, match=r"no layer of .* has known matrices"):
        resolve_gradient_lens(served(MAMBA), GradientLensSpec(prompt, NegativeLogLikelihood((7,))))


def test_part_that_a_block_lacks_is_refused_with_the_layers_that_have_it() -> None:
    (case,) = NEMOTRON_H  # attention in layer 0, an MLP in layer 1, experts in layer 2
    model, prompt = resident(case), tuple(case.prompt)
    assert {found.level for found in model.view.levels} == {Level.PARTS}
    neurons = FindNeuronsSpec((7,), False, (), 0, 5)
    assert resolve_find_neurons(model, neurons).layers == (1, 2)
    with pytest.raises(InvalidRequest, match=r"layer 0 of .* has no MLP; .* have one: 1, 2$"):
        resolve_find_neurons(model, replace(neurons, layers=(0,)))
    with pytest.raises(InvalidRequest, match=r"layer 1 of .* has no attention; .* one: 0$"):
        resolve_trace(model, TraceSpec(prompt, selection=Selection(only_heads=(Unit(1, 0),))))
    spec = ActivationsSpec(prompt, (Site.NEURONS, Site.ATTENTION_PATTERN), layers=())
    sites = {
        (event.layer, event.site)
        for event in activations(resolve_activations(model, spec), lambda: None)
        if isinstance(event, SiteValues)
    }
    assert sites == {(0, Site.ATTENTION_PATTERN), (1, Site.NEURONS), (2, Site.NEURONS)}


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (
            Case("bloom", "normed residual", {"apply_residual_connection_post_layernorm": True}),
            "apply_residual_connection_post_layernorm",
        ),
        (Case("bloom", "slices", {"slow_but_exact": True, "pretraining_tp": 2}), "slow_but_exact"),
        (Case("opt", "no final norm", {"_remove_final_layer_norm": True}), "final norm"),
        (Case("diffllama", "differential", {}), "reproduce the attention of layer 0"),
        (HEADS_BY_LAYER, "num_attention_heads of dots3_note_text depends on the layer: expected"),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else "",
)
def test_variant_without_known_parts_is_shown_with_the_reason(case: Case, reason: str) -> None:
    view = served(case).view
    assert not view.known
    assert reason in view.levels[0].reason


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (
            Case("minimax", "normed residual", HEADS | {"num_local_experts": 4}),
            "the block adds its sublayers to the result of post_attention_layernorm, a norm,",
        ),
        (
            Case("openai-gpt", "post-norms", {}),
            "the block returns the result of ln_2, a norm of the sum",
        ),
        (
            Case("git", "post-norms within modules", {"vision_config": TOWER}),
            "the block returns the result of output.LayerNorm, a norm of the sum",
        ),
        (
            Case("doge", "weighted residual", {"num_key_value_heads": 2}),
            "multiplies its input by input_residual and post_attention_residual:",
        ),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else "",
)
def test_block_without_its_input_in_its_sum_is_shown_with_the_cause(
    case: Case, reason: str
) -> None:
    for found in served(case).view.levels:
        assert found.level is Level.STREAM
        assert reason in found.reason
        assert "self-check" not in found.reason


def test_block_that_scales_its_input_is_shown_with_the_factor() -> None:
    def halve(network: Any) -> None:
        for block in network.model.layers:
            whole = block.forward
            block.forward = lambda x, *args, whole=whole, **named: whole(x, *args, **named) - x / 2

    model, _ = checked(resident(Case("llama", "halved", HEADS), prepare=halve))
    for found in model.view.levels:
        assert found.level is Level.STREAM
        assert found.reason.startswith("the block multiplies its input by 0.5: the residual")
    assert model.view.facts.n_heads == 0


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("falcon", "eager alibi", {"alibi": True}), "SDPA"),
        (Case("gemma", "bidirectional", BIDIRECTIONAL), "causal"),
        (Case("gemma3_text", "bidirectional", BIDIRECTIONAL), "causal"),
        (Case("bert", "encoder", {}), "causal"),
        (Case("electra", "head wider than the blocks", {"embedding_size": 40}), "causal"),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else "",
)
def test_model_that_is_no_causal_decoder_is_refused(case: Case, reason: str) -> None:
    torch.manual_seed(0)
    attention = "eager" if case.family == "falcon" else "sdpa"
    network = AutoModelForCausalLM.from_config(case.config(), attn_implementation=attention)
    with pytest.raises(ModelFailed, match=reason):
        view_of(network.eval())


def test_blocks_without_a_stream_are_refused() -> None:
    network = plain(MAMBA)
    blocks = network.backbone.layers
    handle = blocks[1].register_forward_pre_hook(lambda _module, args: (2 * args[0], *args[1:]))
    try:
        with pytest.raises(ModelFailed, match="block 1 does not read what block 0 returns"):
            stream.view(network, "")
    finally:
        handle.remove()
