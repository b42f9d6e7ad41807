"""Compare routing, neurons and factors of mixtures with plain Hugging Face models."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from januslens_server.errors import InvalidRequest
from januslens_server.pipelines.activations import activations
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.preview_edit import preview_edit
from januslens_server.pipelines.resolve import (
    resolve_activations,
    resolve_gradient_lens,
    resolve_preview_edit,
    resolve_trace,
)
from januslens_server.pipelines.self_check import self_check
from januslens_server.pipelines.trace import trace
from januslens_server.results import (
    NAMED_KINDS,
    EdgeKind,
    GradientMatrix,
    LayerGraph,
    MatrixKind,
    NodeKind,
    SiteValues,
    TraceSummary,
)
from januslens_server.specs import (
    ActivationsSpec,
    DescentStep,
    ForwardShift,
    GradientLensSpec,
    InterventionSpec,
    LensSpec,
    NegativeLogLikelihood,
    PreviewEditSpec,
    Scale,
    Selection,
    Site,
    TraceSpec,
    Zero,
)
from tests.architectures.cases import LLAMA4, MIXTURES, SHARED_EXPERTS, UNGATED, Case
from tests.architectures.test_sites import joined
from tests.architectures.tiny_models import plain, resident
from tests.reference.interventions import experts_neurons, experts_output
from tests.support.results import only

TARGET = 7
every_case = pytest.mark.parametrize(
    "case", MIXTURES + SHARED_EXPERTS + UNGATED, ids=lambda case: case.id
)
every_ungated_case = pytest.mark.parametrize("case", UNGATED, ids=lambda case: case.id)


def mlps(network: Any) -> list[Any]:
    """The MLP of each layer; in Nemotron-H, the only sublayer."""
    return [layer.mlp if hasattr(layer, "mlp") else layer.mixer for layer in network.model.layers]


@every_case
def test_every_guarantee_holds(case: Case) -> None:
    guarantees = self_check(resident(case))
    assert len(guarantees) == 4
    for guarantee in guarantees:
        assert guarantee.measured_error < 1e-5, guarantee


@every_case
def test_sums_hold_at_every_position_of_a_prompt_longer_than_the_window(case: Case) -> None:
    spec = TraceSpec(
        tuple(case.prompt),
        all_positions=True,
        selection=Selection(0, 0, 0, 0),
        lens=LensSpec(0, 0),
        include_logit_contribution=True,
        include_checks=True,
    )
    *_, summary = trace(resolve_trace(resident(case), spec), lambda: None)
    assert isinstance(summary, TraceSummary)
    assert all(check.measured_error < 1e-5 for check in summary.checks), summary.checks


@every_case
def test_attention_equals_the_eager_models(case: Case) -> None:
    output = plain(case)(torch.tensor([case.prompt]), output_attentions=True)
    spec = TraceSpec(tuple(case.prompt), all_positions=True, selection=Selection(0, 0, 1, 0))
    compared = 0
    for event in trace(resolve_trace(resident(case), spec), lambda: None):
        if not isinstance(event, LayerGraph):
            continue
        nodes = {node.id: node for node in event.nodes}
        for edge in event.edges:
            if edge.kind is EdgeKind.ATTEND:
                key = nodes[edge.target]
                expected = output.attentions[event.layer][0, key.head, key.position]
                assert edge.attention == pytest.approx(
                    expected[key.source_position].item(), abs=1e-6
                )
                compared += 1
    assert compared > 100


@every_case
def test_neurons_are_those_of_the_routed_experts(case: Case) -> None:
    """Activations from the plain model's own router and expert weights, one expert at a time."""
    network = plain(case)
    inputs: dict[Any, Tensor] = {}
    mixtures = [mlp for mlp in mlps(network) if hasattr(mlp, "experts")]
    hooks = [
        mlp.register_forward_pre_hook(lambda mlp, args: inputs.update({mlp: args[0][0, -1]}))
        for mlp in mixtures
    ]
    with torch.no_grad():
        network(torch.tensor([case.prompt]))
    for hook in hooks:
        hook.remove()

    spec = TraceSpec(tuple(case.prompt), selection=Selection(1, 1, 0, 0), lens=LensSpec(0, 0))
    for event in trace(resolve_trace(resident(case), spec), lambda: None):
        if not isinstance(event, LayerGraph):
            continue
        mlp = mlps(network)[event.layer]
        if mlp not in inputs:
            continue
        found = {
            (node.expert, node.neuron): activation
            for node, activation in zip(event.nodes, event.activations.tolist(), strict=True)
            if node.kind is NodeKind.MLP_VALUE
        }
        if found:  # the final norm and the prediction come in a piece of their own
            expected = routed_neurons(mlp, inputs[mlp])
            assert found.keys() == expected.keys()
            for place, value in expected.items():
                assert found[place] == pytest.approx(value, rel=1e-4, abs=1e-6)


@torch.no_grad()
def routed_neurons(mlp: Any, x: Tensor) -> dict[tuple[int, int], float]:
    router = mlp.router if hasattr(mlp, "router") else mlp.gate
    _, weights, chosen = router(x[None])
    half = 0.5 if getattr(mlp, "shared_expert_combination_strategy", "") == "average" else 1.0
    found = {}
    for weight, expert in zip(weights[0], chosen[0].tolist(), strict=True):
        read = mlp.fc1_latent_proj(x) if hasattr(mlp, "fc1_latent_proj") else x
        values = half * weight * neurons(mlp.experts, expert, read)
        for neuron, value in enumerate(values.tolist()):
            found[expert, neuron] = value
    shared = getattr(mlp, "shared_experts", None) or getattr(mlp, "shared_expert", None)
    if shared is not None:
        opening = mlp.shared_expert_gate(x).sigmoid() if hasattr(mlp, "shared_expert_gate") else 1
        values = shared.act_fn(shared.up_proj(x))
        if hasattr(shared, "gate_proj"):
            values = half * opening * shared.act_fn(shared.gate_proj(x)) * shared.up_proj(x)
        count = len(mlp.experts.down_proj)
        found |= {(count, neuron): value for neuron, value in enumerate(values.tolist())}
    return found


def neurons(experts: Any, expert: int, x: Tensor) -> Tensor:
    if hasattr(experts, "gate_up_proj_bias"):
        both = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        activated: Tensor = experts._apply_gate(both)
    elif not hasattr(experts, "gate_up_proj"):
        activated = experts.act_fn(experts.up_proj[expert] @ x)
    else:
        gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
        activated = experts.act_fn(gate) * up
    return activated


@every_ungated_case
def test_keys_and_values_of_latent_experts_are_in_the_residual_basis(case: Case) -> None:
    """An expert's matrices times those of the linear maps around the experts, if there are any."""
    layers = [*mlps(plain(case)), None]  # the final norm has the number after the last layer
    spec = TraceSpec(
        tuple(case.prompt),
        selection=Selection(0, 0, 0, 0),
        lens=LensSpec(0, 0),
        include_vectors=True,
    )
    compared = set()
    for event in trace(resolve_trace(resident(case), spec), lambda: None):
        if not isinstance(event, LayerGraph) or not hasattr(layers[event.layer], "experts"):
            continue
        mlp = layers[event.layer]
        assert event.vectors is not None
        for node, vector in zip(event.nodes, event.vectors, strict=True):
            if node.kind not in {NodeKind.MLP_KEY, NodeKind.MLP_VALUE}:
                continue
            expected = neuron_in_residual_basis(mlp, node)
            torch.testing.assert_close(torch.tensor(vector), expected, rtol=1e-4, atol=1e-5)
            compared.add((node.kind, node.expert == len(mlp.experts.down_proj)))
    assert len(compared) == 4


@torch.no_grad()
def neuron_in_residual_basis(mlp: Any, node: Any) -> Tensor:
    is_key = node.kind is NodeKind.MLP_KEY
    if node.expert == len(mlp.experts.down_proj):
        shared = mlp.shared_experts
        own: Tensor = shared.up_proj.weight[node.neuron]
        return own if is_key else shared.down_proj.weight[:, node.neuron]
    if is_key:
        own, first = mlp.experts.up_proj[node.expert, node.neuron], mlp.fc1_latent_proj
        return own if isinstance(first, nn.Identity) else own @ first.weight
    own, last = mlp.experts.down_proj[node.expert, :, node.neuron], mlp.fc2_latent_proj
    return own if isinstance(last, nn.Identity) else last.weight @ own


@every_case
def test_changed_result_is_what_the_model_adds(case: Case) -> None:
    """The site is behind a norm of the experts' sum (A.X K1); most models have no such norm."""
    network, layer = plain(case), max(resident(case).view.known)
    before = logits_of(case)
    hook = mlps(network)[layer].register_forward_hook(halved)
    try:
        with torch.no_grad():
            expected = network(torch.tensor([case.prompt]), use_cache=False).logits[0]
    finally:
        hook.remove()
    found = logits_of(case, InterventionSpec(Site.MLP_OUTPUT, Scale(0.5), layers=(layer,)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, before, rtol=1e-2, atol=1e-3)


def halved(_module: Any, _args: Any, output: Any) -> Any:
    return (0.5 * output[0], *output[1:]) if isinstance(output, tuple) else 0.5 * output


def logits_of(case: Case, *changes: InterventionSpec) -> Tensor:
    spec = ActivationsSpec(tuple(case.prompt), (Site.LOGITS,), interventions=changes)
    events = list(activations(resolve_activations(resident(case), spec), lambda: None))
    return joined([event for event in events if isinstance(event, SiteValues)])


CHANGED = {"experts": (3, 0, 1), "neurons": (7, 1, 4)}
CHANGES = (
    InterventionSpec(Site.NEURONS, Scale(-0.5), **CHANGED),
    InterventionSpec(Site.NEURONS, Zero(), neurons=(2, 3), experts=(0, 2)),
    InterventionSpec(Site.NEURONS, Zero(), experts=(2,), positions=(0, 4)),
)
with_and_without_changes = pytest.mark.parametrize(
    ("case", "changes"),
    [
        *((case, ()) for case in MIXTURES + SHARED_EXPERTS + UNGATED),
        *((case, CHANGES) for case in MIXTURES + UNGATED),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else "changed" if value else "plain",
)


@contextmanager
def neurons_changed(network: Any, changes: Sequence[InterventionSpec]) -> Iterator[None]:
    """Apply `CHANGES` to the network inside the context, if there are changes."""

    def forward(experts: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        neurons = experts_neurons(experts, x)
        factors = torch.ones_like(neurons)
        factors[:, torch.tensor(CHANGED["experts"])[:, None], list(CHANGED["neurons"])] = -0.5
        factors[:, torch.tensor([0, 2])[:, None], [2, 3]] = 0
        factors[[0, 4], 2] = 0
        return experts_output(experts, neurons * factors, chosen, weights)

    mixtures = [mlp.experts for mlp in mlps(network) if changes and hasattr(mlp, "experts")]
    for experts in mixtures:
        experts.forward = partial(forward, experts)
    try:
        yield
    finally:
        for experts in mixtures:
            del experts.forward


@with_and_without_changes
def test_factors_are_the_dense_gradients_of_every_expert(
    case: Case, changes: tuple[InterventionSpec, ...]
) -> None:
    network = plain(case)
    network.zero_grad()
    with neurons_changed(network, changes):
        (-next_token(network, case)[TARGET]).backward()
    spec = GradientLensSpec(
        tuple(case.prompt),
        NegativeLogLikelihood((TARGET,)),
        matrices=NAMED_KINDS,
        components=0,
        include_factors=True,
        interventions=changes,
    )
    seen: set[tuple[int, MatrixKind, int | None]] = set()
    for event in gradient_lens(resolve_gradient_lens(resident(case), spec), lambda: None):
        if isinstance(event, GradientMatrix) and event.expert is not None:
            dense = expert_gradient(mlps(network)[event.layer], event)
            parts = event.components
            assert parts.inputs is not None
            assert parts.vjps is not None
            difference = np.linalg.norm(parts.inputs.T @ parts.vjps - dense.numpy())
            assert difference <= 1e-5 * np.linalg.norm(dense), (event.kind, event.expert)
            seen.add((event.layer, event.kind, event.expert))
    kinds = {kind for _, kind, _ in seen}
    gated = {MatrixKind.GATE, MatrixKind.UP, MatrixKind.FF2}
    assert kinds == ({MatrixKind.FF1, MatrixKind.FF2} if case in UNGATED else gated)
    assert_nothing_is_missing(network, seen)


def expert_gradient(mlp: Any, matrix: GradientMatrix) -> Tensor:
    """Select dL/dW `[d_in, d_out]` from the gradient of a 3-D parameter or the shared expert."""
    experts = mlp.experts
    if matrix.expert == len(experts.down_proj):
        shared = getattr(mlp, "shared_experts", None) or mlp.shared_expert
        names = {MatrixKind.GATE: "gate_proj", MatrixKind.FF2: "down_proj"}
        module = getattr(shared, names.get(matrix.kind, "up_proj"))
        gradient: Tensor = module.weight.grad.T
        return gradient
    rows_first = hasattr(experts, "gate_up_proj_bias")
    first_name = "up_proj" if matrix.kind is MatrixKind.FF1 else "gate_up_proj"
    name = "down_proj" if matrix.kind is MatrixKind.FF2 else first_name
    own: Tensor = getattr(experts, name).grad[matrix.expert]
    own = own if rows_first else own.T
    if matrix.kind in {MatrixKind.FF1, MatrixKind.FF2}:
        return own
    first = matrix.kind is MatrixKind.GATE
    if rows_first:  # gate and up alternate
        return own[:, 0 if first else 1 :: 2]
    return own.chunk(2, dim=1)[0 if first else 1]


def assert_nothing_is_missing(network: Any, seen: set[tuple[int, MatrixKind, int | None]]) -> None:
    """Experts without routed positions have a gradient of zero; all others have factors."""
    for number, mlp in enumerate(mlps(network)):
        if hasattr(mlp, "experts"):
            gradient = mlp.experts.down_proj.grad
            moved = gradient.flatten(1).abs().sum(1).nonzero().flatten().tolist()
            routed = {e for at, kind, e in seen if at == number and kind is MatrixKind.FF2}
            assert set(moved) <= routed
            shared = hasattr(mlp, "shared_experts") or hasattr(mlp, "shared_expert")
            assert (len(gradient) in routed) == shared


def test_facts_include_the_experts() -> None:
    facts = resident(MIXTURES[1]).view.facts
    assert (facts.n_experts, facts.d_mlp, facts.n_kv_heads) == (4, 16, 2)


@with_and_without_changes
def test_descent_step_on_experts_equals_sgd_on_a_copy(
    case: Case, changes: tuple[InterventionSpec, ...]
) -> None:
    edited, rate = copy.deepcopy(plain(case)), 0.1
    edited.zero_grad()
    with neurons_changed(edited, changes):
        (-next_token(edited, case)[TARGET]).backward()
    unchanged = plain(case)
    with (
        torch.no_grad(),
        neurons_changed(edited, changes),
        neurons_changed(unchanged, changes),
    ):
        for name, parameter in edited.named_parameters():
            in_mlp = ".mlp." in name or ".mixer." in name
            if in_mlp and name.removesuffix(".weight").endswith(MLP_MATRICES):
                parameter.sub_(rate * parameter.grad)
        before, after = next_token(unchanged, case), next_token(edited, case)
    step = DescentStep((), (), rate)
    spec = PreviewEditSpec(tuple(case.prompt), (TARGET,), step, interventions=changes)
    preview = only(preview_edit(resolve_preview_edit(resident(case), spec), lambda: None))
    effect = preview.edited
    assert effect.probability_before == pytest.approx(before[TARGET].exp().item(), rel=1e-5)
    assert effect.probability_after == pytest.approx(after[TARGET].exp().item(), rel=1e-5)
    assert effect.probability_after > effect.probability_before
    assert effect.predicted_after == int(after.argmax())
    bits = (before.exp() * (before - after)).sum().item() / math.log(2)
    assert effect.kl_bits == pytest.approx(bits, rel=1e-3, abs=1e-6)


MLP_MATRICES = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


@contextmanager
def weighted_inputs_changed(network: Any) -> Iterator[list[Tensor]]:
    """Change neurons 1 and 4 of Llama 4's experts 3 and 0; record the neurons `[E, pos, d_mlp]`."""
    seen: list[Tensor] = []

    def forward(experts: Any, read: Tensor) -> Tensor:
        by_expert = read.view(experts.num_experts, -1, experts.hidden_size)
        gate, up = torch.bmm(by_expert, experts.gate_up_proj).chunk(2, dim=-1)
        neurons = experts.act_fn(gate) * up
        factors = torch.ones_like(neurons)
        factors[torch.tensor([3, 0])[:, None], :, [1, 4]] = -0.5
        seen.append(neurons * factors)
        return torch.bmm(seen[-1], experts.down_proj).view(-1, experts.hidden_size)

    mixtures = [layer.feed_forward.experts for layer in network.model.layers if layer.is_moe_layer]
    for experts in mixtures:
        experts.forward = partial(forward, experts)
    try:
        yield seen
    finally:
        for experts in mixtures:
            del experts.forward


def test_neurons_of_experts_with_weighted_inputs_are_changed_and_edited_as_in_hugging_face() -> (
    None
):
    (case,) = LLAMA4
    change = InterventionSpec(
        Site.NEURONS, Scale(-0.5), experts=(3, 0), neurons=(1, 4), layers=(0, 1)
    )
    with weighted_inputs_changed(plain(case)) as seen, torch.no_grad():
        before = next_token(plain(case), case)
    read = ActivationsSpec(
        tuple(case.prompt), (Site.NEURONS,), (0, 1), float32=True, interventions=(change,)
    )
    values = [
        event.data.view(np.float32).reshape(event.shape)
        for event in activations(resolve_activations(resident(case), read), lambda: None)
        if isinstance(event, SiteValues)
    ]
    for found, expected in zip(values, seen, strict=True):
        np.testing.assert_allclose(found, expected.transpose(0, 1), rtol=1e-4, atol=1e-6)

    edited, rate = copy.deepcopy(plain(case)), 0.1
    with weighted_inputs_changed(edited):
        (-next_token(edited, case)[TARGET]).backward()
        with torch.no_grad():
            for name, parameter in edited.named_parameters():
                if name.removesuffix(".weight").endswith(MLP_MATRICES):
                    parameter.sub_(rate * parameter.grad)
            after = next_token(edited, case)
    step = DescentStep((), (), rate)
    spec = PreviewEditSpec(tuple(case.prompt), (TARGET,), step, interventions=(change,))
    effect = only(preview_edit(resolve_preview_edit(resident(case), spec), lambda: None)).edited
    assert effect.probability_before == pytest.approx(before[TARGET].exp().item(), rel=1e-5)
    assert effect.probability_after == pytest.approx(after[TARGET].exp().item(), rel=1e-5)
    assert effect.probability_after > effect.probability_before


def next_token(network: Any, case: Case) -> Tensor:
    log_p: Tensor = network(torch.tensor([case.prompt])).logits[0, -1].log_softmax(-1)
    return log_p


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ({"experts": (4,)}, r"\[0\].experts: NEURONS has no routed expert 4; expected 0 to 3"),
        ({"experts": (2, 2)}, "experts are repeated; send each once"),
        ({"experts": (1,), "layers": (0, 1)}, "layer 1 has no experts; name only layers"),
        ({"neurons": (16,), "layers": (0,)}, "no neuron 16; expected 0 to 15"),
    ],
    ids=str,
)
def test_experts_that_do_not_fit_are_refused(where: dict[str, Any], text: str) -> None:
    mixed = MIXTURES[1]
    changes = (InterventionSpec(Site.NEURONS, Zero(), **where),)
    with pytest.raises(InvalidRequest, match=text):
        resolve_trace(resident(mixed), TraceSpec(tuple(mixed.prompt), interventions=changes))


def test_forward_shift_of_a_mixture_is_refused() -> None:
    spec = PreviewEditSpec((1, 2, 3), (TARGET,), ForwardShift(0, 0.2))
    with pytest.raises(InvalidRequest, match="layer 0 has experts"):
        list(preview_edit(resolve_preview_edit(resident(MIXTURES[0]), spec), lambda: None))


def test_edit_of_a_mixtures_attention_is_applied() -> None:
    attention = (MatrixKind.Q, MatrixKind.K, MatrixKind.V, MatrixKind.O)
    spec = PreviewEditSpec((1, 2, 3), (TARGET,), DescentStep(attention, (), 0.05))
    result = only(preview_edit(resolve_preview_edit(resident(MIXTURES[0]), spec), lambda: None))
    assert result.edited.probability_after > result.edited.probability_before
