"""Compare the attention gradients of GradientLens with autograd on eager attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from januslens_server.errors import RequestCancelled, never_cancelled
from januslens_server.pipelines import attention_gradients
from januslens_server.pipelines.activations import activations
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.resolve import resolve_activations, resolve_gradient_lens
from januslens_server.results import (
    AttentionGradient,
    GradientEvent,
    GradientMatrix,
    MatrixKind,
    SiteValues,
)
from januslens_server.specs import (
    ActivationsSpec,
    Add,
    BlockSources,
    GradientLensSpec,
    InterventionSpec,
    NegativeLogLikelihood,
    Noise,
    Scale,
    Site,
)
from tests.architectures import oracle
from tests.architectures.cases import CASES, MIXTURES, WITHOUT_ADAPTER, Case
from tests.architectures.test_sites import joined
from tests.architectures.tiny_models import resident

TARGET = 7
Gradients = dict[int, tuple[Tensor, Tensor, Tensor]]
GPT2 = next(case for case in CASES if case.family == "gpt2")
LLAMA = next(case for case in CASES if case.id == "llama-grouped")


def events(
    case: Case,
    check: Callable[[], None] = never_cancelled,
    changes: tuple[InterventionSpec, ...] = (),
    layers: tuple[int, ...] = (),
) -> Iterator[GradientEvent]:
    spec = GradientLensSpec(
        tuple(case.prompt),
        NegativeLogLikelihood((TARGET,)),
        matrices=(MatrixKind.Q,),
        layers=layers,
        components=0,
        include_factors=True,
        verify=True,
        interventions=changes,
        include_attention_gradients=True,
    )
    return gradient_lens(resolve_gradient_lens(resident(case), spec), check)


def gradients_of(found: list[GradientEvent]) -> Gradients:
    """Join the pieces: the probabilities, dL/da and dL/ds `[query, head, source]` by layer."""
    pieces: dict[int, list[AttentionGradient]] = {}
    for event in found:
        if isinstance(event, AttentionGradient):
            own = pieces.setdefault(event.layer, [])
            assert event.offset == sum(len(piece.pattern) for piece in own)
            own.append(event)

    def whole(own: list[AttentionGradient], name: str) -> Tensor:
        flat = np.concatenate([getattr(piece, name) for piece in own])
        return torch.from_numpy(flat.reshape(own[0].shape))

    names = ("pattern", "pattern_gradient", "score_gradient")
    return {
        layer: (whole(own, names[0]), whole(own, names[1]), whole(own, names[2]))
        for layer, own in pieces.items()
    }


def loss(logits: Tensor) -> Tensor:
    return -logits[-1].log_softmax(-1)[TARGET]


@pytest.mark.parametrize("case", CASES + MIXTURES + WITHOUT_ADAPTER, ids=lambda case: case.id)
def test_gradients_of_attention_equal_those_of_eager_attention(case: Case) -> None:
    found = gradients_of(list(events(case)))
    expected = oracle.attention_gradients(case, loss)
    assert list(found) == list(range(len(expected)))[::-1]
    for layer, tensors in enumerate(expected):
        for ours, theirs in zip(found[layer], tensors, strict=True):
            error = 1e-5 * max(1e-3, float(theirs.abs().max()))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=error)


def test_gradients_of_a_changed_pass_give_the_vjps_of_queries() -> None:
    """Products of score gradients and keys are the VJPs, which are compared with autograd."""
    vector = np.linspace(-1, 1, resident(GPT2).view.facts.d_model, dtype=np.float32)
    changes = (
        InterventionSpec(Site.VALUE, Noise(0.3, 5)),
        InterventionSpec(
            Site.ATTENTION_PATTERN, BlockSources(), positions=(5, 8), sources=(2,), heads=(1,)
        ),
        InterventionSpec(Site.HEAD_RESULT, Scale(-0.5), layers=(1,), heads=(1,)),
        InterventionSpec(Site.ATTENTION_OUTPUT, Add(vector), layers=(0,), positions=(3,)),
    )
    found = list(events(GPT2, changes=changes))
    plain = gradients_of(list(events(GPT2)))
    for layer, (pattern, _, of_scores) in gradients_of(found).items():
        assert not pattern[[5, 8], 1, 2].any()
        assert not of_scores[[5, 8], 1, 2].any()
        assert (of_scores - plain[layer][2]).abs().max() > 1e-4
        keys = of_layer(Site.KEY, layer, changes)
        scale = resident(GPT2).view.attention(layer).scoring.scale
        pulled = torch.einsum("phs,she->phe", of_scores, keys).flatten(1) * scale
        (matrix,) = (m for m in found if isinstance(m, GradientMatrix) and m.layer == layer)
        assert matrix.verification is not None
        assert matrix.verification.held
        assert matrix.components.vjps is not None
        expected = torch.zeros_like(pulled)
        expected[torch.from_numpy(matrix.components.positions)] = torch.from_numpy(
            matrix.components.vjps
        )
        error = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(pulled, expected, rtol=1e-4, atol=error)


def of_layer(site: Site, layer: int, changes: tuple[InterventionSpec, ...]) -> Tensor:
    spec = ActivationsSpec(tuple(GPT2.prompt), (site,), (layer,), interventions=changes)
    found = activations(resolve_activations(resident(GPT2), spec), never_cancelled)
    return joined([event for event in found if isinstance(event, SiteValues)])


def test_pieces_equal_the_whole_and_come_before_the_matrices_of_their_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = gradients_of(list(events(LLAMA, layers=(1,))))
    monkeypatch.setattr(attention_gradients, "STEP_BYTES", 1)  # one row at a time
    found = list(events(LLAMA))
    order = [(e.layer, type(e)) for e in found if isinstance(e, AttentionGradient | GradientMatrix)]
    assert order == [
        place
        for layer in (1, 0)
        for place in (*[(layer, AttentionGradient)] * 9, (layer, GradientMatrix))
    ]
    assert list(whole) == [1]
    for one, all_at_once in zip(gradients_of(found)[1], whole[1], strict=True):
        torch.testing.assert_close(one, all_at_once, rtol=1e-5, atol=1e-7)


def test_cancelled_request_stops_between_two_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_gradients, "STEP_BYTES", 1)
    sent: list[GradientEvent] = []

    def check() -> None:
        if any(isinstance(event, AttentionGradient) for event in sent):
            raise RequestCancelled("the caller cancelled the request")

    with pytest.raises(RequestCancelled):
        sent.extend(events(LLAMA, check))
    assert sum(isinstance(event, AttentionGradient) for event in sent) == 1
