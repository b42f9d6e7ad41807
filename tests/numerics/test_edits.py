"""Compare PreviewEdit with an edited copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from januslens_server.errors import InvalidRequest
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.preview_edit import preview_edit
from januslens_server.pipelines.resolve import resolve_preview_edit
from januslens_server.results import EditPreview, Effect, MatrixKind
from januslens_server.specs import (
    DescentStep,
    EditGrid,
    ForwardShift,
    InterventionSpec,
    PreviewEditSpec,
    Probe,
    Site,
    Zero,
)
from tests.reference.examples import EXAMPLES, LoadExample, prompt
from tests.support.results import only

ATTENTION = (MatrixKind.Q, MatrixKind.K, MatrixKind.V, MatrixKind.O)


def preview(resident: ResidentModel, spec: PreviewEditSpec) -> EditPreview:
    return only(preview_edit(resolve_preview_edit(resident, spec), lambda: None))


def next_token(network: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        log_p: Tensor = network(torch.tensor([ids])).logits[0, -1].double().log_softmax(0)
    return log_p


def assert_effect(effect: Effect, before: Tensor, after: Tensor, target: int) -> None:
    assert effect.target_token_id == target
    assert effect.probability_before == pytest.approx(before[target].exp().item(), rel=1e-4)
    assert effect.probability_after == pytest.approx(after[target].exp().item(), rel=1e-4)
    assert effect.rank_before == int((before > before[target]).sum())
    assert effect.rank_after == int((after > after[target]).sum())
    assert effect.predicted_before == int(before.argmax())
    assert effect.predicted_after == int(after.argmax())
    bits = (before.exp() * (before - after)).sum().item() / torch.log(torch.tensor(2.0)).item()
    assert effect.kl_bits == pytest.approx(bits, rel=1e-3, abs=1e-6)


def is_weight_of(name: str, pieces: tuple[str, ...]) -> bool:
    return name.endswith(".weight") and any(piece in name for piece in pieces)


MLP_NAMES = ("mlp.",)
ATTENTION_NAMES = ("attn.", "attention.")


@pytest.mark.parametrize("name", sorted(EXAMPLES))
@pytest.mark.parametrize(
    ("kinds", "pieces"),
    [((), MLP_NAMES), ((*ATTENTION, MatrixKind.FF1, MatrixKind.FF2), MLP_NAMES + ATTENTION_NAMES)],
    ids=["mlp", "all"],
)
def test_descent_step_equals_sgd_on_a_copy(
    name: str, kinds: tuple[MatrixKind, ...], pieces: tuple[str, ...], load_example: LoadExample
) -> None:
    loaded = load_example(name)
    ids, probe, targets, rate = prompt(name, 7), prompt(name, 9)[3:], (17, 5), 0.02
    edited = copy.deepcopy(loaded.network)
    log_p = edited(torch.tensor([[*ids, targets[0]]])).logits[0].log_softmax(-1)
    (-log_p[-2, targets[0]] - log_p[-1, targets[1]]).backward()
    with torch.no_grad():
        for parameter_name, parameter in edited.named_parameters():
            if is_weight_of(parameter_name, pieces):
                parameter.sub_(rate * parameter.grad)

    spec = PreviewEditSpec(
        prompt=tuple(ids),
        target=targets,
        edit=DescentStep(kinds, (), rate),
        probes=(Probe("same target", tuple(probe), None), Probe("other", tuple(probe), (3,))),
    )
    result = preview(loaded.resident, spec)

    for effect, tokens, target in [
        (result.edited, ids, targets[0]),
        (result.probes[0], probe, targets[0]),
        (result.probes[1], probe, 3),
    ]:
        before, after = next_token(loaded.network, tokens), next_token(edited, tokens)
        assert_effect(effect, before, after, target)
    assert [probe.label for probe in result.probes] == ["same target", "other"]
    assert result.edited.probability_after > result.edited.probability_before


@pytest.mark.parametrize("name", sorted(EXAMPLES))
@pytest.mark.parametrize("layer", [0, 2])
def test_a_forward_shift_is_the_papers_update_of_one_matrix(
    name: str, layer: int, load_example: LoadExample
) -> None:
    loaded = load_example(name)
    ids, target, eta = prompt(name, 6), 321, 0.3
    edited = copy.deepcopy(loaded.network)
    ff2 = second_matrix(edited, layer)
    inputs: list[Tensor] = []
    handle = ff2.register_forward_hook(lambda _m, args, _o: inputs.append(args[0][0, -1]))
    next_token(edited, ids)
    handle.remove()
    update = eta * torch.outer(inputs[0], edited.get_input_embeddings().weight[target])
    with torch.no_grad():
        stored = update.T if isinstance(ff2, nn.Linear) else update
        ff2.get_parameter("weight").add_(stored)

    spec = PreviewEditSpec(tuple(ids), (target,), ForwardShift(layer, eta))
    result = preview(loaded.resident, spec)

    before, after = next_token(loaded.network, ids), next_token(edited, ids)
    assert_effect(result.edited, before, after, target)


@pytest.mark.parametrize("name", ["gpt2", "llama_grouped"])
def test_every_edit_of_a_grid_equals_sgd_on_a_copy(name: str, load_example: LoadExample) -> None:
    loaded = load_example(name)
    ids, probe, target = prompt(name, 6), prompt(name, 9)[3:], 17
    grid = EditGrid(layers=(-1, 0), strengths=(0.02, -0.05))
    spec = PreviewEditSpec(
        prompt=tuple(ids),
        target=(target,),
        edit=DescentStep((MatrixKind.FF2,), (), 0.0),
        probes=(Probe("", tuple(probe), None),),
        grid=grid,
    )
    request = resolve_preview_edit(loaded.resident, spec)
    passes, cells = split(preview_edit(request, lambda: None))
    assert passes == 2 * (1 + len(cells))  # before the edits, and after each of them
    places = [(layer, strength) for layer in (0, 2) for strength in grid.strengths]
    assert [(cell.layer, cell.strength) for cell in cells] == places
    for cell, (layer, rate) in zip(cells, places, strict=True):
        edited = copy.deepcopy(loaded.network)
        log_p = edited(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        (-log_p[target]).backward()
        weight = second_matrix(edited, layer).get_parameter("weight")
        assert weight.grad is not None
        with torch.no_grad():
            weight.sub_(rate * weight.grad)
        for effect, tokens in ((cell.edited, ids), (cell.probes[0], probe)):
            before, after = next_token(loaded.network, tokens), next_token(edited, tokens)
            assert_effect(effect, before, after, target)


def split(events: Iterator[EditPreview | None]) -> tuple[int, list[EditPreview]]:
    """Return the number of passes and the previews."""
    found = list(events)
    return found.count(None), [event for event in found if event is not None]


def test_every_shift_of_a_grid_equals_a_single_shift(load_example: LoadExample) -> None:
    resident = load_example("gpt2").resident
    ids = tuple(prompt("gpt2", 6))
    spec = PreviewEditSpec(ids, (321,), ForwardShift(0, 0.0), grid=EditGrid((), (0.3, 0.1)))
    _, cells = split(preview_edit(resolve_preview_edit(resident, spec), lambda: None))
    assert [cell.layer for cell in cells] == [0, 0, 1, 1, 2, 2]
    for cell in cells:
        assert cell.layer is not None
        assert cell.strength is not None
        shift = ForwardShift(cell.layer, cell.strength)
        assert cell.edited == preview(resident, PreviewEditSpec(ids, (321,), shift)).edited


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_gradient_cosine_is_that_of_dense_gradient_and_update(
    name: str, load_example: LoadExample
) -> None:
    loaded = load_example(name)
    network, ids, target = loaded.network, prompt(name, 6), 321
    inputs: dict[int, Tensor] = {}
    weights = {layer: second_matrix(network, layer).get_parameter("weight") for layer in (0, 2)}
    handles = [
        second_matrix(network, layer).register_forward_pre_hook(
            lambda _m, args, layer=layer: inputs.update({layer: args[0][0, -1].detach()})
        )
        for layer in weights
    ]
    logits = network(torch.tensor([ids])).logits[0, -1]
    gradients = torch.autograd.grad(-logits.log_softmax(-1)[target], list(weights.values()))
    for handle in handles:
        handle.remove()

    shift = ForwardShift(0, 0.0, gradient_cosine=True)
    spec = PreviewEditSpec(tuple(ids), (target,), shift, grid=EditGrid((0, 2), (0.3, -2.0)))
    _, cells = split(preview_edit(resolve_preview_edit(loaded.resident, spec), lambda: None))

    embedding = network.get_input_embeddings().weight[target].detach()
    expected: list[float] = []
    for layer, gradient in zip(weights, gradients, strict=True):
        update = torch.outer(inputs[layer], embedding).double()
        stored = update.T if isinstance(second_matrix(network, layer), nn.Linear) else update
        agreed = -(stored * gradient.double()).sum() / (stored.norm() * gradient.double().norm())
        expected += [float(agreed), -float(agreed)]
    assert [cell.gradient_cosine for cell in cells] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    plain = PreviewEditSpec(tuple(ids), (target,), ForwardShift(2, 0.3))
    single = preview(loaded.resident, plain)
    assert single.gradient_cosine is None
    assert single.edited == cells[2].edited


def test_grid_with_too_many_effects_is_refused(load_example: LoadExample) -> None:
    spec = PreviewEditSpec(
        prompt=(3, 4),
        target=(17,),
        edit=DescentStep((), (), 0.0),
        probes=(Probe("", (3, 4), None),) * 64,
        grid=EditGrid((), (0.1,) * 64),
    )
    with pytest.raises(InvalidRequest, match="expected at most 4096 layers times strengths"):
        resolve_preview_edit(load_example("gpt2").resident, spec)


def second_matrix(network: Any, layer: int) -> nn.Module:
    """Return FF2, which each family names differently."""
    body = getattr(network, "transformer", None)
    block = network.model.layers[layer] if body is None else body.h[layer]
    for name in ("c_proj", "down_proj", "fc_out"):
        if hasattr(block.mlp, name):
            module: nn.Module = getattr(block.mlp, name)
            return module
    raise LookupError(f"expected an MLP with a second matrix, got {block.mlp}")


def test_previews_do_not_change_resident_weights_or_modules(load_example: LoadExample) -> None:
    resident = load_example("gpt2").resident
    weights = {name: p.clone() for name, p in resident.network.named_parameters()}
    spec = PreviewEditSpec((1, 2, 3), (4,), DescentStep((), (), 0.5))
    first = preview(resident, spec)
    assert preview(resident, spec) == first
    for name, parameter in resident.network.named_parameters():
        assert torch.equal(parameter, weights[name]), name
        assert not parameter.requires_grad, name
        assert parameter.grad is None, name
    assert not any(module._forward_hooks for module in resident.network.modules())


@contextmanager
def zeroed(network: Any, positions: list[int]) -> Iterator[None]:
    """Zero what the MLP of layer 0 adds at these positions."""

    def zero(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        kept = torch.ones(output.shape[1], 1)
        kept[positions] = 0
        return output * kept

    handle = network.transformer.h[0].mlp.register_forward_hook(zero)
    try:
        yield
    finally:
        handle.remove()


def test_interventions_change_the_edit_and_the_passes_before_and_after(
    load_example: LoadExample,
) -> None:
    loaded = load_example("gpt2")
    ids, probe, targets, rate = prompt("gpt2", 7), prompt("gpt2", 9)[3:], (17, 5), 0.02
    edited = copy.deepcopy(loaded.network)
    with zeroed(edited, [6, 2]):
        log_p = edited(torch.tensor([[*ids, targets[0]]])).logits[0].log_softmax(-1)
        (-log_p[-2, targets[0]] - log_p[-1, targets[1]]).backward()
    with torch.no_grad():
        for name, parameter in edited.named_parameters():
            if is_weight_of(name, MLP_NAMES):
                parameter.sub_(rate * parameter.grad)
    spec = PreviewEditSpec(
        prompt=tuple(ids),
        target=targets,
        edit=DescentStep((), (), rate),
        probes=(Probe("other", tuple(probe), None),),
        interventions=(InterventionSpec(Site.MLP_OUTPUT, Zero(), layers=(0,), positions=(-1, 2)),),
    )
    found = preview(loaded.resident, spec)
    for tokens, effect in ((ids, found.edited), (probe, found.probes[0])):
        at = [len(tokens) - 1, 2]
        with zeroed(loaded.network, at), zeroed(edited, at):
            before, after = (next_token(network, tokens) for network in (loaded.network, edited))
        assert_effect(effect, before, after, targets[0])


def test_position_that_a_probe_lacks_is_refused_with_the_probe(load_example: LoadExample) -> None:
    loaded = load_example("gpt2")
    zero = InterventionSpec(Site.MLP_OUTPUT, Zero(), positions=(6,))
    spec = PreviewEditSpec(
        prompt=tuple(prompt("gpt2", 7)),
        target=(17,),
        edit=DescentStep((), (), 0.1),
        probes=(Probe("", (3, 4), None),),
        interventions=(zero,),
    )
    with pytest.raises(InvalidRequest, match=r"on probes\[0\]: position 6 is outside the prompt"):
        preview(loaded.resident, spec)
