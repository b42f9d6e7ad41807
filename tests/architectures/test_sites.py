"""Compare the values of sites with those of plain Hugging Face models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from januslens_server.errors import InvalidRequest, never_cancelled
from januslens_server.models.experts import Experts
from januslens_server.models.views import Mlp
from januslens_server.pipelines.activations import activations
from januslens_server.pipelines.resolve import resolve_activations
from januslens_server.results import SiteValues
from januslens_server.specs import ActivationsSpec, InterventionSpec, Site, Zero
from tests.architectures import oracle
from tests.architectures.cases import CASES, GEMMA4, MIXTURES, WITHOUT_ADAPTER, Case
from tests.architectures.tiny_models import plain, resident
from tests.reference.interventions import HookedModel

every_case = pytest.mark.parametrize(
    "case", CASES + MIXTURES + WITHOUT_ADAPTER, ids=lambda case: case.id
)
dense_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def read(
    case: Case, *sites: Site, data_type: torch.dtype = torch.float32, **options: Any
) -> dict[tuple[int | None, Site], Tensor]:
    """Return the values of sites, assembled from the pieces of a stream."""
    spec = ActivationsSpec(tuple(case.prompt), sites, **options)
    request = resolve_activations(resident(case, data_type), spec)
    parts: dict[tuple[int | None, Site], list[SiteValues]] = {}
    for event in activations(request, never_cancelled):
        if isinstance(event, SiteValues):
            parts.setdefault((event.layer, Site(event.site)), []).append(event)
    return {key: joined(pieces) for key, pieces in parts.items()}


def joined(pieces: list[SiteValues]) -> Tensor:
    kind = TORCH[pieces[0].data_type]
    found = torch.from_numpy(np.concatenate([piece.data for piece in pieces])).view(kind)
    offsets = np.cumsum([0, *(piece.data.nbytes // found.itemsize for piece in pieces)])
    assert [piece.offset for piece in pieces] == offsets[:-1].tolist()
    return found.reshape(pieces[0].shape)


@torch.no_grad()
def hidden_states(network: Any, case: Case) -> list[Tensor]:
    """The embedding, each block's output except the last one's, and the final norm's output."""
    ids = torch.tensor([case.prompt])
    found = network(ids, use_cache=False, output_hidden_states=True).hidden_states
    return [state[0] for state in found]


def test_normed_values_and_per_layer_inputs_are_read_and_changed_as_in_hugging_face() -> None:
    (case,), changed = GEMMA4, {}
    network = plain(case)

    def zeroed(site: Site, layer: int) -> Any:
        def after(_module: Any, _args: Any, output: Tensor) -> Tensor:
            changed[layer, site] = output[0].clone()
            return torch.zeros_like(output)

        return after

    modules = {Site.VALUE: "self_attn.v_norm", Site.MIXER_OUTPUT: "post_per_layer_input_norm"}
    for site, name in modules.items():
        handles = [
            block.get_submodule(name).register_forward_hook(zeroed(site, layer))
            for layer, block in enumerate(network.model.layers)
        ]
        with torch.no_grad():
            expected = network(torch.tensor([case.prompt]), use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        zero = (InterventionSpec(site, Zero()),)
        found = read(case, Site.LOGITS, interventions=zero)[None, Site.LOGITS]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        first = read(case, site)[0, site]
        torch.testing.assert_close(first, changed[0, site], rtol=1e-4, atol=1e-5)


@every_case
def test_residual_stream_equals_hidden_states_bit_for_bit(case: Case) -> None:
    network: Any = resident(case).network
    ids = torch.tensor([case.prompt])
    states = hidden_states(network, case)
    found = read(case, Site.EMBEDDING, Site.BLOCK_OUTPUT, Site.FINAL_NORM, Site.LOGITS)
    assert torch.equal(found[None, Site.EMBEDDING], states[0])
    for layer, state in enumerate(states[1:-1]):
        assert torch.equal(found[layer, Site.BLOCK_OUTPUT], state)
    if case.id != "opt-projected":  # its last hidden state is projected to the embedding's width
        assert torch.equal(found[None, Site.FINAL_NORM], states[-1])
    with torch.no_grad():
        assert torch.equal(found[None, Site.LOGITS], network(ids, use_cache=False).logits[0])


@every_case
def test_sublayers_add_up_to_the_residual_stream(case: Case) -> None:
    residual = read(case, Site.EMBEDDING)[None, Site.EMBEDDING]
    found = read(case, Site.ATTENTION_OUTPUT, Site.MLP_OUTPUT, Site.BLOCK_OUTPUT)
    for layer, block in resident(case).view.known.items():
        attention, mlp = found[layer, Site.ATTENTION_OUTPUT], found[layer, Site.MLP_OUTPUT]
        if block.residual_mid is None:
            with pytest.raises(InvalidRequest, match=f"layer {layer} of .* has no RESIDUAL_MID"):
                read(case, Site.RESIDUAL_MID, layers=(layer,))
        else:
            middle = read(case, Site.RESIDUAL_MID, layers=(layer,))[layer, Site.RESIDUAL_MID]
            assert torch.equal(middle, residual + attention)
            assert torch.equal(found[layer, Site.BLOCK_OUTPUT], middle + mlp)
        residual = residual + attention + mlp
        torch.testing.assert_close(found[layer, Site.BLOCK_OUTPUT], residual)
        residual = found[layer, Site.BLOCK_OUTPUT]


@dense_case
def test_pattern_equals_eager_attention(case: Case) -> None:
    found = read(case, Site.ATTENTION_PATTERN)
    for layer, expected in enumerate(oracle.attentions(case)):
        pattern = found[layer, Site.ATTENTION_PATTERN].transpose(0, 1)
        torch.testing.assert_close(pattern, expected, rtol=1e-4, atol=1e-6)


@every_case
def test_patterns_mix_values_to_head_results(case: Case) -> None:
    found = read(case, Site.ATTENTION_PATTERN, Site.VALUE, Site.HEAD_RESULT)
    gates = oracle.gates(case)
    for layer in range(len(resident(case).view.blocks)):
        pattern, values = found[layer, Site.ATTENTION_PATTERN], found[layer, Site.VALUE]
        values = values.repeat_interleave(pattern.shape[1] // values.shape[1], dim=1)
        mixed = torch.einsum("phs,shd->phd", pattern, values) * gates.get(layer, 1.0)
        torch.testing.assert_close(mixed, found[layer, Site.HEAD_RESULT], rtol=1e-4, atol=1e-5)


@every_case
def test_neurons_are_the_input_of_the_last_map(case: Case) -> None:
    model = resident(case)
    for layer, block in model.view.known.items():
        if not isinstance(block.mlp, Mlp):
            continue
        taken: list[Tensor] = []
        handle = block.mlp.ff2.module.register_forward_pre_hook(
            lambda _module, args, taken=taken: taken.append(args[0])
        )
        hidden_states(model.network, case)
        handle.remove()
        neurons = read(case, Site.NEURONS, layers=(layer,))[layer, Site.NEURONS]
        assert torch.equal(neurons, taken[0].flatten(0, -2))


@pytest.mark.parametrize("case", MIXTURES, ids=lambda case: case.id)
def test_neurons_of_experts_equal_those_of_a_hooked_model(case: Case) -> None:
    expected = HookedModel(plain(case)).run(case.prompt)
    found = read(case, Site.NEURONS)
    some = read(case, Site.NEURONS, positions=(2, 5), experts=(3, 1))
    mixtures = [
        layer for layer, b in resident(case).view.known.items() if isinstance(b.mlp, Experts)
    ]
    assert mixtures
    for layer in mixtures:
        neurons = expected["NEURONS", layer]
        assert (neurons == 0).all(-1).any()  # some experts are not chosen
        torch.testing.assert_close(found[layer, Site.NEURONS], neurons)
        chosen = some[layer, Site.NEURONS]
        torch.testing.assert_close(chosen, neurons[[2, 5]][:, [1, 3]])


@pytest.mark.parametrize("case", MIXTURES, ids=lambda case: case.id)
def test_router_logits_choose_the_experts(case: Case) -> None:
    network: Any = plain(case)
    with torch.no_grad():
        ids = torch.tensor([case.prompt])
        expected = network(ids, use_cache=False, output_router_logits=True).router_logits
    found = read(case, Site.ROUTER)
    assert len(found) == len(expected)
    for values, logits in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(values, logits)


@pytest.mark.parametrize("data_type", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_sent_as_it_is_or_as_float32(data_type: torch.dtype) -> None:
    case = next(case for case in CASES if case.id == "llama-grouped")
    state = hidden_states(resident(case, data_type).network, case)[1]
    own = read(case, Site.BLOCK_OUTPUT, data_type=data_type)
    wide = read(case, Site.BLOCK_OUTPUT, data_type=data_type, float32=True)
    assert torch.equal(own[0, Site.BLOCK_OUTPUT], state)
    assert torch.equal(wide[0, Site.BLOCK_OUTPUT], state.float())


def test_positions_and_heads_select_rows_of_the_whole_tensor() -> None:
    case = next(case for case in CASES if case.id == "llama-grouped")
    sites = (Site.QUERY, Site.KEY, Site.ATTENTION_PATTERN, Site.BLOCK_OUTPUT, Site.LOGITS)
    whole = read(case, *sites)
    some = read(case, *sites, positions=(-1, 2), heads=(1,), layers=(1,))
    assert {layer for layer, _ in some} == {1, None}
    for (layer, site), values in some.items():
        rows = whole[layer, site][[2, -1]]
        torch.testing.assert_close(values, rows[:, [1]] if values.dim() == 3 else rows)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sites": ()}, "sites: no sites given; send at least one"),
        ({"layers": (2,)}, "layers: .* has no layer 2; expected -2 to 1"),
        ({"positions": (9,)}, "position 9 is outside the prompt"),
        ({"heads": (4,)}, "heads: QUERY has no head 4; expected 0 to 3"),
        (
            {"sites": (Site.KEY, Site.QUERY), "heads": (2,)},
            "heads: KEY has no head 2; expected 0 to 1",
        ),
        ({"experts": (0,)}, "experts: no requested site has experts; expected NEURONS"),
        ({"sites": (Site.LOGITS,), "heads": (0,)}, "heads: none of the sites has heads"),
        (
            {"sites": (Site.LOGITS, Site.ROUTER)},
            r"sites\[1\]: layer 0 of .* has no ROUTER; expected one of ATTENTION_INPUT, QUERY",
        ),
    ],
    ids=str,
)
def test_invalid_selections_are_refused(options: dict[str, Any], text: str) -> None:
    case = next(case for case in CASES if case.id == "llama-grouped")
    sites = options.pop("sites", (Site.QUERY,))
    with pytest.raises(InvalidRequest, match=text):
        read(case, *sites, **options)
