"""The pages that `find_neurons` requests, and the result that it returns."""

from __future__ import annotations

import pytest

from januslens import Client, FoundNeurons
from januslens._requests import find_neurons_request
from januslens.cli.lookups import show_found_neurons
from januslens.cli.tables import console
from januslens.v1 import common_pb2, neurons_pb2
from tests.client.messages import projection, tokens
from tests.client.scripted import Script, serving


def page(
    *neurons: int, following: str = "", expert: int | None = None
) -> neurons_pb2.FindNeuronsResponse:
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


def asked(
    limit: int | None, *pages: neurons_pb2.FindNeuronsResponse
) -> tuple[list[tuple[int, str]], FoundNeurons]:
    """The sizes and tokens of the requested pages, and the result."""
    script = Script(neuron_pages=pages)
    with serving(script) as address, Client(address) as client:
        found = client.find_neurons(2, limit=limit)
    return [(request.page_size, request.page_token) for request in script.neuron_requests], found


def test_all_pages_are_requested() -> None:
    calls, found = asked(None, page(1, 2, following="a"), page(3, following="b"), page(4))
    assert calls == [(1000, ""), (1000, "a"), (1000, "b")]
    assert [hit.neuron for hit in found.neurons] == [1, 2, 3, 4]


def test_requests_stop_at_the_limit() -> None:
    calls, found = asked(1500, page(1, following="a"), page(2, following="b"))
    assert calls == [(1000, ""), (500, "a")]
    assert len(found.neurons) == 2
    assert asked(20, page(1, following="a"))[0] == [(20, "")]


def test_found_neuron_has_its_name_projection_and_row() -> None:
    _, found = asked(1, page(5, expert=0))
    (hit,) = found.neurons
    assert str(hit) == "L1 expert 0 neuron 5"
    assert (hit.rank, hit.logit, hit.value.target_rank) == (1, 2.5, 1)
    assert [token.text for token in hit.value.top_tokens] == [" d", " c"]
    assert (found.token.text, found.total, found.depth, found.suppressed) == (" c", 7, 64, False)
    frame = found.to_pandas()
    assert frame.loc[0, "expert"] == 0
    assert frame.loc[0, "bottom_tokens"] == ["\n"]


def test_layers_without_neurons_are_printed_with_the_reason() -> None:
    first = page(5)
    first.limited_layers.add(layer=0, level=common_pb2.LEVEL_STREAM, reason="no MLP")
    out = console()
    with out.capture() as captured:
        show_found_neurons(asked(1, first)[1], out)
    assert "layer 0: residual stream only (no MLP)" in captured.get()


def test_nothing_found_is_an_empty_frame() -> None:
    _, found = asked(1, page())
    assert found.neurons == ()
    assert len(found.to_pandas()) == 0


@pytest.mark.parametrize("limit", [0, -1])
def test_an_impossible_limit_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match="limit"):
        find_neurons_request(2, limit=limit)
