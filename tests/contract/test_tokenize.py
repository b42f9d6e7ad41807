"""Tokenize: the tokens of a text, and the characters that each covers."""

from __future__ import annotations

import itertools

import grpc
import pytest

from januslens.v1 import common_pb2, models_pb2, service_pb2_grpc, trace_pb2

Stub = service_pb2_grpc.IntrospectionServiceStub

TEXTS = [
    "The capital of Japan is the city of",
    "  two  spaces\tand\na line",
    "naïve café, Zürich",
    "東京 is Tokyo",
    "\u2581 and Ġ are no spaces",
    "👩‍👩‍👧 e\u0301 \u202e",
    "\x00\x7f",
]


def tokens_of(stub: Stub, text: str) -> list[common_pb2.Token]:
    return list(stub.Tokenize(models_pb2.TokenizeRequest(text=text)).tokens)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_join_to_the_text_and_spans_cover_it(stub: Stub, text: str) -> None:
    tokens = tokens_of(stub, text)
    assert b"".join(token.raw for token in tokens).decode() == text
    assert tokens[0].start == 0
    assert tokens[-1].end == len(text)
    for token, following in itertools.pairwise(tokens):
        # Pieces of one character all cover that character.
        assert token.start <= following.start <= token.end <= following.end
        assert following.start in {token.start, token.end}


def test_tokens_come_with_the_model_that_made_them(stub: Stub) -> None:
    (model,) = stub.ListModels(models_pb2.ListModelsRequest()).models
    revision = model.provenance.revision
    answer = stub.Tokenize(models_pb2.TokenizeRequest(text="a", revision=revision))
    assert answer.provenance == model.provenance


def test_the_text_of_a_whole_token_is_its_span(stub: Stub) -> None:
    text = TEXTS[0]
    tokens = tokens_of(stub, text)
    assert [text[token.start : token.end] for token in tokens] == [token.text for token in tokens]
    assert tokens[3].text == " Japan"


def test_part_of_a_character_has_replacement_text_and_its_raw_byte(stub: Stub) -> None:
    tokens = tokens_of(stub, "東")
    assert len(tokens) == 3
    assert {token.text for token in tokens} == {"\ufffd"}
    assert b"".join(token.raw for token in tokens) == "東".encode()
    assert {(token.start, token.end) for token in tokens} == {(0, 1)}


def test_trace_and_tokenize_read_special_token_names_alike(stub: Stub) -> None:
    """A trace runs the tokens that Tokenize returns."""
    text = "<|endoftext|> Japan"
    header = next(
        iter(stub.Trace(trace_pb2.TraceRequest(input=common_pb2.Input(prompt=text), layers=[0])))
    ).header
    said = stub.Tokenize(models_pb2.TokenizeRequest(text=text, with_special_tokens=True)).tokens
    assert list(header.prompt_tokens) == list(said)


def test_concurrent_calls_return_the_same_tokens(stub: Stub) -> None:
    requests = [models_pb2.TokenizeRequest(text=text) for text in TEXTS] * 20
    alone = {text: tokens_of(stub, text) for text in TEXTS}
    calls = [stub.Tokenize.future(request) for request in requests]
    for request, call in zip(requests, calls, strict=True):
        assert list(call.result().tokens) == alone[request.text]


def test_control_tokens_in_a_text_are_tokens_of_a_prompt_and_characters_where_it_is_literal(
    stub: Stub,
) -> None:
    control = "<|endoftext|>"
    request = models_pb2.TokenizeRequest(text=f"Japan{control}", with_special_tokens=True)
    named = stub.Tokenize(request).tokens[-1]
    assert named.text == control
    request.literal = True
    literal = stub.Tokenize(request).tokens
    assert named.id not in {token.id for token in literal}
    assert b"".join(token.raw for token in literal).decode() == request.text
    assert named.id not in {token.id for token in tokens_of(stub, request.text)}
    assert [token.id for token in tokens_of(stub, control)] == [named.id]


def test_a_literal_prompt_and_target_reach_the_model_as_characters(stub: Stub) -> None:
    control = "<|endoftext|>"
    (named,) = tokens_of(stub, control)
    request = trace_pb2.TraceRequest(
        input=common_pb2.Input(prompt=f"Japan{control} is", literal=True), layers=[0]
    )
    header = next(iter(stub.Trace(request))).header
    assert named.id not in {token.id for token in header.prompt_tokens}
    request.input.literal = False
    request.target.text = control
    header = next(iter(stub.Trace(request))).header
    assert named.id in {token.id for token in header.prompt_tokens}
    assert header.targets[0].target_token_id == named.id


@pytest.mark.parametrize("with_special_tokens", [False, True])
@pytest.mark.parametrize("text", ["1" * 131_072, "\u0301" * 65_536])
def test_a_text_of_too_many_tokens_is_refused(
    stub: Stub, text: str, with_special_tokens: bool
) -> None:
    request = models_pb2.TokenizeRequest(text=text, with_special_tokens=with_special_tokens)
    with pytest.raises(grpc.RpcError) as refused:
        stub.Tokenize(request)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "too many tokens: expected at most 32768" in str(refused.value.details())
    longest = models_pb2.TokenizeRequest(text="1" * 32_768)
    assert len(stub.Tokenize(longest).tokens) == 32_768
