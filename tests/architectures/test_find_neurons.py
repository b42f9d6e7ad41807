"""Compare FindNeurons with plain Hugging Face models, whose modules project every value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from januslens_server.pipelines.find_neurons import find_neurons
from januslens_server.pipelines.resolve import resolve_find_neurons
from januslens_server.results import FoundNeurons
from januslens_server.specs import FindNeuronsSpec
from tests.architectures.cases import MEASURED, Case
from tests.architectures.tiny_models import plain, resident
from tests.support.results import only

TOKEN = 7
EVERY_ONE = 10**6

# With and without biases and centred norms; gated, capped, scaled, with post-norms, with experts,
# and without an adapter.
CHOSEN = [
    "bloom-power of two",
    "cohere-biased",
    "gemma2-grouped, capped, window",
    "gpt2-plain",
    "gpt_neox-parallel",
    "gpt_oss-sinks, window",
    "granite-grouped",
    "llama-grouped",
    "mixtral-window",
    "olmo2-multi-query",
    "qwen2_moe-gated shared expert",
    "qwen3_moe-mixed with dense",
    "nemotron-automatic",
    "nemotron_h-one sublayer per block, latent experts",
]
CASES = [case for case in MEASURED if case.id in CHOSEN]

Place = tuple[int, int, int]


def test_chosen_cases_exist() -> None:
    assert len(CASES) == len(CHOSEN)


@pytest.mark.parametrize("suppressed", [False, True], ids=["promoted", "suppressed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_neurons_match_the_weights_projections(case: Case, suppressed: bool) -> None:
    found = search(case, suppressed)
    expected = {
        place: logits
        for place, logits in read_values(case)
        if int(before(logits, suppressed).sum()) < found.depth
    }
    assert found.total == len(found.ranks) == len(expected) > 20
    for i, place in enumerate(places(found)):
        logits = expected[place]
        assert found.ranks[i] == before(logits, suppressed).sum()
        assert found.projections.target_ranks[i, 0] == (logits > logits[TOKEN]).sum()
        reported = capped(case, logits)
        assert found.projections.target_logits[i, 0] == pytest.approx(
            reported[TOKEN].item(), rel=1e-4, abs=1e-5
        )
        top = logits.argsort(descending=True)[:5]
        assert found.projections.top_ids[i].tolist() == top.tolist()
        assert found.projections.bottom_ids[i].tolist() == logits.argsort()[:5].tolist()
        chances = reported.softmax(0)
        assert found.projections.target_probabilities[i, 0] == pytest.approx(
            chances[TOKEN].item(), rel=1e-3
        )
        assert found.projections.top_probabilities[i] == pytest.approx(
            chances[top].numpy(), rel=1e-3
        )
        assert found.projections.entropy_bits[i] == pytest.approx(
            -(chances * chances.log2()).sum().item(), abs=1e-4
        )


@pytest.mark.parametrize("suppressed", [False, True], ids=["promoted", "suppressed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_neurons_are_ordered_by_rank_then_logit(case: Case, suppressed: bool) -> None:
    found = search(case, suppressed)
    logits = found.projections.target_logits[:, 0]
    keys = list(zip(found.ranks, logits if suppressed else -logits, strict=True))
    assert keys == sorted(keys)
    assert len(set(places(found))) == found.total


def search(case: Case, suppressed: bool) -> FoundNeurons:
    spec = FindNeuronsSpec((TOKEN,), suppressed, layers=(), start=0, count=EVERY_ONE)
    return only(find_neurons(resolve_find_neurons(resident(case), spec), lambda: None))


def places(found: FoundNeurons) -> list[Place]:
    columns = np.stack([found.layers, found.experts, found.neurons], axis=1)
    return [(layer, expert, neuron) for layer, expert, neuron in columns.tolist()]


def before(logits: Tensor, suppressed: bool) -> Tensor:
    """Return the tokens that are ranked before a token at the searched end."""
    return logits < logits[TOKEN] if suppressed else logits > logits[TOKEN]


@torch.no_grad()
def read_values(case: Case) -> Iterator[tuple[Place, Tensor]]:
    """Return the layer, the index and the value's logits `[vocab]` of each neuron."""
    network = plain(case)
    scale = {"cohere": "logit_scale"}.get(case.family)
    divisor = {"granite": "logits_scaling"}.get(case.family)
    for layer, block in enumerate(blocks(network)):
        for expert, rows in value_matrices(block.mlp if hasattr(block, "mlp") else block.mixer):
            logits = network.get_output_embeddings()(final_norm(network)(rows)).double()
            if scale:
                logits *= getattr(network.config, scale)
            if divisor:
                logits /= getattr(network.config, divisor)
            for neuron, row in enumerate(logits):
                yield (layer, expert, neuron), row


def capped(case: Case, logits: Tensor) -> Tensor:
    cap = getattr(plain(case).config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def body(network: Any) -> Any:
    return next(
        getattr(network, name)
        for name in ("transformer", "gpt_neox", "model")
        if hasattr(network, name)
    )


def blocks(network: Any) -> Any:
    return body(network).h if hasattr(body(network), "h") else body(network).layers


def final_norm(network: Any) -> Any:
    names = ("ln_f", "final_layer_norm", "norm", "norm_f")
    return next(getattr(body(network), name) for name in names if hasattr(body(network), name))


def value_matrices(mlp: Any) -> Iterator[tuple[int, Tensor]]:
    """Return FF2 `[d_mlp, d_model]`, or that of each expert with its number."""
    if hasattr(mlp, "experts"):
        # gpt_oss multiplies by the matrix as it is stored, the others by its transpose.
        down = mlp.experts.down_proj
        if "GptOss" not in type(mlp.experts).__name__:
            down = down.transpose(1, 2)
        after = getattr(mlp, "fc2_latent_proj", None)  # a linear map behind the sum
        yield from enumerate(down if after is None else down @ after.weight.T)
        shared = getattr(mlp, "shared_expert", None) or getattr(mlp, "shared_experts", None)
        if shared is not None:
            yield len(down), shared.down_proj.weight.T
    elif hasattr(mlp, "o_proj"):  # attention, the only sublayer of a block
        return
    elif hasattr(mlp, "c_proj"):  # a Conv1D
        yield -1, mlp.c_proj.weight
    else:
        linear = mlp.dense_4h_to_h if hasattr(mlp, "dense_4h_to_h") else mlp.down_proj
        yield -1, linear.weight.T
