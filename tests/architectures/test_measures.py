"""The measures detect an adapter that omits a distinct point of its family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from januslens_server.graph.weights import HeadMap
from januslens_server.models.views import Attention, Block, Mlp, ModelView
from tests.architectures import measures
from tests.architectures.cases import CASES
from tests.architectures.measures import MEASURES
from tests.architectures.tiny_models import resident

Change = Callable[[ModelView], ModelView]


def in_blocks(change: Callable[[Block], Block]) -> Change:
    return lambda view: replace(view, blocks=tuple(change(block) for block in view.known.values()))


def in_attention(change: Callable[[Attention], Attention]) -> Change:
    return in_blocks(lambda block: replace(block, attention=change(attention_of(block))))


def attention_of(block: Block) -> Attention:
    assert block.attention is not None
    return block.attention


def in_scoring(**changes: Any) -> Change:
    return in_attention(lambda own: replace(own, scoring=replace(own.scoring, **changes)))


def without_maps(attention: Attention) -> Attention:
    return replace(attention, query_map=HeadMap(), key_map=HeadMap())


def with_heads_apart(attention: Attention) -> Attention:
    norm = attention.query_map.norm
    assert norm is not None
    return replace(attention, query_map=HeadMap(norm=replace(norm, spans_heads=False)))


def keys_for_values(attention: Attention) -> Attention:
    return replace(attention, key=attention.value, value=attention.key)


def added_at_once(block: Block) -> Block:
    return replace(block, attention=replace(attention_of(block), finish=None, added=None))


def not_copied(block: Block) -> Block:
    assert isinstance(block.mlp, Mlp)
    return replace(block, mlp=replace(block.mlp, ff2=replace(block.mlp.ff2, overwritten=False)))


def rotated_as_the_first(view: ModelView) -> ModelView:
    rotation = view.attention(0).rotation
    return in_attention(lambda own: replace(own, rotation=rotation))(view)


def in_lens(**changes: Any) -> Change:
    return lambda view: replace(view, lens=replace(view.lens, **changes))


MISTAKES: dict[str, tuple[str, Change, str]] = {
    "no window": ("mistral-grouped, window", in_scoring(window=None), "attention"),
    "no soft-cap of scores": (
        "gemma2-grouped, capped, window",
        in_scoring(soft_cap=None),
        "attention",
    ),
    "no soft-cap of logits": (
        "gemma2-grouped, capped, window",
        in_lens(soft_cap=None),
        "lens",
    ),
    "no logit scale": ("cohere-biased", in_lens(logit_scale=1.0), "logit"),
    "no ALiBi": ("bloom-power of two", in_scoring(alibi=None), "attention"),
    "no rotation": (
        "phi-multi-head",
        in_attention(lambda own: replace(own, rotation=None)),
        "pull-backs",
    ),
    "a rotation too many": ("smollm3-multi-head, biased", rotated_as_the_first, "pull-backs"),
    "the local rotation everywhere": (
        "gemma3_text-grouped, two rotations, window",
        rotated_as_the_first,
        "attention",
    ),
    "no query and key norms": (
        "qwen3-grouped, window",
        in_attention(without_maps),
        "pull-backs",
    ),
    "norms of each head": (
        "olmo2-grouped, biased",
        in_attention(with_heads_apart),
        "pull-backs",
    ),
    "no clipped queries": ("mpt-clipped", in_attention(without_maps), "pull-backs"),
    "no clipped values": (
        "mpt-clipped",
        in_attention(lambda own: replace(own, value_map=HeadMap())),
        "sums",
    ),
    "keys for values": ("phi3-grouped, window", in_attention(keys_for_values), "attention"),
    "no residual multiplier": ("granite-grouped", in_blocks(added_at_once), "shares"),
    "no post-norm": ("olmo2-multi-query", in_blocks(added_at_once), "logit"),
    "what is overwritten not copied": ("falcon-multi-query", in_blocks(not_copied), "sums"),
}


@pytest.mark.parametrize(("name", "change", "measure"), MISTAKES.values(), ids=MISTAKES)
def test_measure_detects_an_omission_of_an_adapter(
    name: str, change: Change, measure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = (case for case in CASES if case.id == name)
    model = resident(case)
    wrong = replace(model, view=change(model.view))
    monkeypatch.setattr(measures, "resident", lambda _case: wrong)
    (noticing,) = (candidate for candidate in MEASURES if candidate.name == measure)
    measures.traced.cache_clear()
    try:
        error = noticing.error(case)
    finally:
        measures.traced.cache_clear()
    assert error > 100 * noticing.tolerance
