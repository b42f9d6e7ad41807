"""FindNeurons over the wire: its pages, and the projection of each neuron."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from januslens.v1 import lens_pb2, models_pb2, neurons_pb2, service_pb2_grpc, trace_pb2
from januslens.v1.common_pb2 import Target, TokenIds
from tests.support.calls import prompt, refused

Stub = service_pb2_grpc.IntrospectionServiceStub
Request = neurons_pb2.FindNeuronsRequest
Response = neurons_pb2.FindNeuronsResponse

TOKYO = Target(text=" Tokyo")


def pages(stub: Stub, request: Request) -> Iterator[Response]:
    while True:
        yield stub.FindNeurons(request)
        page = stub.FindNeurons(request)
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


@pytest.mark.parametrize("size", [1, 50, 1000])
def test_pages_join_to_the_whole_list(stub: Stub, size: int) -> None:
    request = Request(token=TOKYO, page_size=1000, layers=[3])
    whole = stub.FindNeurons(request)
    request.page_size = size
    answers = list(pages(stub, request))
    assert [hit for page in answers for hit in page.neurons] == list(whole.neurons)
    assert all(len(page.neurons) == size for page in answers[:-1])
    assert {(page.total, page.depth) for page in answers} == {(len(whole.neurons), whole.depth)}


def test_defaults_are_the_contracts(stub: Stub, demo: models_pb2.Model) -> None:
    page = stub.FindNeurons(Request(token=TOKYO))
    assert len(page.neurons) == 20 < page.total
    assert {hit.layer for hit in page.neurons} == set(range(demo.n_layers))
    assert page.provenance == demo.provenance
    assert not any(hit.HasField("expert") for hit in page.neurons)
    assert stub.FindNeurons(Request(token=TOKYO, page_size=2**32 - 1)).total == page.total


@pytest.mark.parametrize("suppressed", [False, True])
def test_neuron_projection_equals_that_in_a_trace(stub: Stub, suppressed: bool) -> None:
    trace = trace_pb2.TraceRequest(
        input=prompt("The capital of Japan is the city of"),
        target=TOKYO,
        selection=trace_pb2.Selection(top_neurons=0),
        layers=[3],
        node_kinds=[trace_pb2.NODE_KIND_MLP_VALUE],
    )
    values = {
        node.neuron: node.projection
        for response in stub.Trace(trace)
        for node in response.layer.nodes
    }
    request = Request(token=TOKYO, layers=[3], suppressed=suppressed, page_size=1000)
    found = stub.FindNeurons(request)
    assert found.total > 10
    for hit in found.neurons:
        assert_equal(hit.value, values[hit.neuron])
        assert hit.logit == hit.value.target_logit
        if not suppressed:
            assert hit.rank == hit.value.target_rank
    listing = {
        neuron
        for neuron, value in values.items()
        if value.target_rank < found.depth and not suppressed
    }
    assert suppressed or {hit.neuron for hit in found.neurons} == listing


def assert_equal(ours: lens_pb2.Projection, theirs: lens_pb2.Projection) -> None:
    """Compare up to the last bits, which depend on the other rows of the matrix product."""
    assert ours.target_rank == theirs.target_rank
    for name in ("top", "bottom"):
        assert getattr(ours, f"{name}_token_ids") == getattr(theirs, f"{name}_token_ids")
        assert list(getattr(ours, f"{name}_logits")) == pytest.approx(
            list(getattr(theirs, f"{name}_logits")), rel=1e-4
        )
        assert list(getattr(ours, f"{name}_probabilities")) == pytest.approx(
            list(getattr(theirs, f"{name}_probabilities")), rel=1e-4
        )
    assert ours.entropy_bits == pytest.approx(theirs.entropy_bits, abs=1e-4)
    assert ours.target_probability == pytest.approx(theirs.target_probability, rel=1e-4)


def test_every_token_that_is_named_has_its_text(stub: Stub) -> None:
    page = stub.FindNeurons(Request(token=TOKYO, page_size=7))
    named = {page.token_id} | {
        i for hit in page.neurons for i in (*hit.value.top_token_ids, *hit.value.bottom_token_ids)
    }
    texts = {token.id: token.text for token in page.tokens}
    assert texts.keys() == named
    assert texts[page.token_id] == " Tokyo"


def test_the_largest_page_fits_into_a_message(stub: Stub) -> None:
    every = stub.FindNeurons(Request(token=Target(text=" the"), page_size=1000))
    assert every.ByteSize() < 2**20


def test_a_token_that_no_neuron_lists_is_an_empty_answer(
    stub: Stub, demo: models_pb2.Model
) -> None:
    totals = {}
    for token_id in range(0, demo.vocab_size, 40):
        token = Target(token_ids=TokenIds(ids=[token_id]))
        page = stub.FindNeurons(Request(token=token, layers=[0], page_size=1))
        totals[token_id] = page.total
        assert len(page.neurons) == min(1, page.total)
        assert page.tokens[0].raw or page.tokens
    assert max(totals.values()) > 0


@pytest.mark.parametrize(
    "change",
    [
        {"token": Target(text=" Paris")},
        {"suppressed": True},
        {"layers": [1]},
        {"page_token": "x"},
        {"page_token": "0.{0}"},
        {"page_token": "999999.{0}"},
        {"page_token": "9" * 5000},
    ],
    ids=str,
)
def test_a_page_token_of_another_request_is_refused(
    stub: Stub, channel: grpc.Channel, change: dict[str, object]
) -> None:
    request = Request(token=TOKYO, page_size=2)
    issued = stub.FindNeurons(request).next_page_token
    signature = issued.partition(".")[2]
    wrong = {"token": TOKYO, "page_token": issued} | change
    wrong["page_token"] = str(wrong["page_token"]).replace("{0}", signature)
    answer = refused(channel, "FindNeurons", Request(**wrong))  # type: ignore[arg-type]  # of several types
    assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
    assert answer.fields == ["page_token"]


def test_text_of_several_tokens_is_refused_with_a_list_of_them(channel: grpc.Channel) -> None:
    answer = refused(channel, "FindNeurons", Request(token=Target(text=" Paris Tokyo")))
    assert answer.fields == ["token"]
    assert "2 tokens given (" in answer.text
