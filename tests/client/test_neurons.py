"""The pages that `find_neurons` asks for, and what it makes of them."""

from __future__ import annotations

import pytest

from januslens import FoundNeurons
from januslens._calls import find_neurons
from januslens.v1 import neurons_pb2
from tests.client.messages import projection, tokens


def page(*neurons: int, following: str = "", expert: int | None = None) -> object:
    return neurons_pb2.FindNeuronsResponse(
        neurons=[
            neurons_pb2.NeuronHit(
                layer=1,
                neuron=neuron,
                expert=expert,
                rank=1,
                logit=2.5,
                value=projection(3, 2, bottom=[4], rank=1),
            )
            for neuron in neurons
        ],
        next_page_token=following,
        tokens=tokens(2, 3, 4),
        token_id=2,
        depth=64,
        total=7,
    )


def asked(limit: int | None, *answers: object) -> tuple[list[tuple[int, str]], FoundNeurons]:
    """The sizes and tokens of the pages asked for, and the result."""
    exchange = find_neurons(2, limit=limit)
    calls = []
    call = next(exchange)
    try:
        for answer in answers:
            request = call.request
            assert isinstance(request, neurons_pb2.FindNeuronsRequest)
            calls.append((request.page_size, request.page_token))
            call = exchange.send(answer)
    except StopIteration as finished:
        return calls, finished.value
    raise LookupError("expected the verb to end")


def test_pages_are_asked_for_until_there_is_no_more() -> None:
    calls, found = asked(None, page(1, 2, following="a"), page(3, following="b"), page(4))
    assert calls == [(1000, ""), (1000, "a"), (1000, "b")]
    assert [hit.neuron for hit in found.neurons] == [1, 2, 3, 4]


def test_no_more_than_the_limit_is_asked_for() -> None:
    calls, found = asked(1500, page(1, following="a"), page(2, following="b"))
    assert calls == [(1000, ""), (500, "a")]
    assert len(found.neurons) == 2
    assert asked(20, page(1, following="a"))[0] == [(20, "")]


def test_a_neuron_says_whose_it_is_and_what_it_writes() -> None:
    _, found = asked(1, page(5, expert=0))
    (hit,) = found.neurons
    assert str(hit) == "L1 expert 0 neuron 5"
    assert (hit.rank, hit.logit, hit.value.target_rank) == (1, 2.5, 1)
    assert [token.text for token in hit.value.top_tokens] == [" d", " c"]
    assert (found.token.text, found.total, found.depth, found.suppressed) == (" c", 7, 64, False)
    frame = found.to_pandas()
    assert frame.loc[0, "expert"] == 0
    assert frame.loc[0, "bottom_tokens"] == ["\n"]


def test_nothing_found_is_an_empty_frame() -> None:
    _, found = asked(1, page())
    assert found.neurons == ()
    assert len(found.to_pandas()) == 0


@pytest.mark.parametrize("limit", [0, -1])
def test_an_impossible_limit_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match="limit"):
        next(find_neurons(2, limit=limit))
