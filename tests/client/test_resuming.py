"""A stream that is interrupted anywhere and resumed equals the uninterrupted stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from januslens._resuming import (
    ActivationsSplice,
    DifferentAnswer,
    GradientSplice,
    InterveneSplice,
    TraceSplice,
)
from januslens.assemblers import (
    ActivationsAssembler,
    GradientAssembler,
    InterveneAssembler,
    TraceAssembler,
)
from januslens.v1 import (
    activations_pb2,
    common_pb2,
    gradient_lens_pb2,
    intervene_pb2,
    interventions_pb2,
    service_pb2_grpc,
    sites_pb2,
    trace_pb2,
)
from tests.support.calls import long_trace, prompt, timeless

JAPAN = prompt("The capital of Japan is the city of")
PARIS = common_pb2.Target(text=" Paris")
NLL = gradient_lens_pb2.NegativeLogLikelihood(target=PARIS)

ALL = [gradient_lens_pb2.MatrixKind.Value(f"MATRIX_KIND_{k}") for k in "Q K V O FF1 FF2".split()]

TRACES = {
    "all layers": trace_pb2.TraceRequest(input=JAPAN),
    "with contributions": trace_pb2.TraceRequest(
        input=JAPAN, include_logit_contribution=True, overlap_k=20, top_k=2
    ),
    "layers apart": trace_pb2.TraceRequest(input=JAPAN, layers=[0, 2, 3], overlap_k=5),
    "from above": trace_pb2.TraceRequest(input=JAPAN, layers=[1, 3], positions=[2, 5, -1]),
    "some kinds": trace_pb2.TraceRequest(
        input=JAPAN, node_kinds=[trace_pb2.NODE_KIND_RESIDUAL_MID, trace_pb2.NODE_KIND_MLP_VALUE]
    ),
    "checked": trace_pb2.TraceRequest(input=JAPAN, include_checks=True, target=PARIS),
    "checked with contributions": trace_pb2.TraceRequest(
        input=JAPAN, include_checks=True, include_logit_contribution=True
    ),
    "many messages": long_trace(1),
}

# Its tensors have several pieces.
LONG = common_pb2.Input(token_ids=common_pb2.TokenIds(ids=range(400, 496)))
GRADIENTS = {
    "usual": gradient_lens_pb2.GradientLensRequest(input=JAPAN, nll=NLL),
    "all matrices": gradient_lens_pb2.GradientLensRequest(
        input=JAPAN, nll=NLL, matrices=ALL, components=0, include_factors=True
    ),
    "some layers": gradient_lens_pb2.GradientLensRequest(input=JAPAN, nll=NLL, layers=[3, 1]),
    "attention": gradient_lens_pb2.GradientLensRequest(
        input=LONG, nll=NLL, layers=[3, 1], include_attention_gradients=True
    ),
    "by segment": gradient_lens_pb2.GradientLensRequest(
        input=JAPAN, nll=NLL, subject=gradient_lens_pb2.Subject(text="Japan")
    ),
    "much of it": gradient_lens_pb2.GradientLensRequest(
        input=JAPAN, nll=NLL, spectrum_rank=2, neurons=3, verify=True, top_k=50, learning_rate=0.1
    ),
}

ACTIVATIONS = {
    "tensors of several pieces": activations_pb2.ActivationsRequest(
        input=LONG,
        sites=[sites_pb2.SITE_EMBEDDING, sites_pb2.SITE_KEY, sites_pb2.SITE_LOGITS],
    ),
}

INTERVENTIONS = {
    "a sweep over heads": intervene_pb2.InterveneRequest(
        input=JAPAN,
        sweep=intervene_pb2.Sweep(
            template=interventions_pb2.Intervention(site=sites_pb2.SITE_HEAD_RESULT, zero=True),
            by_layer=True,
            by_head=True,
        ),
    ),
}

CASES: dict[str, tuple[str, Any, Any, Message]] = {
    **{f"trace, {k}": ("Trace", TraceSplice, TraceAssembler, r) for k, r in TRACES.items()},
    **{
        f"gradient, {k}": ("GradientLens", GradientSplice, GradientAssembler, r)
        for k, r in GRADIENTS.items()
    },
    **{
        f"activations, {k}": ("Activations", ActivationsSplice, ActivationsAssembler, r)
        for k, r in ACTIVATIONS.items()
    },
    **{
        f"intervene, {k}": ("Intervene", InterveneSplice, InterveneAssembler, r)
        for k, r in INTERVENTIONS.items()
    },
}


@pytest.fixture(scope="module")
def stub(server_address: str) -> Iterator[Any]:
    with grpc.insecure_channel(server_address) as channel:
        yield service_pb2_grpc.IntrospectionServiceStub(channel)


def joined(splice: Any, responses: Sequence[Any]) -> list[Any]:
    return [message for response in responses for message in splice.take(copied(response))]


def copied(response: Any) -> Any:
    copy = type(response)()
    copy.CopyFrom(response)
    return copy


def parts(messages: Sequence[Any]) -> list[bytes]:
    """Return the stream's content as bytes, without ids, times and the division into messages."""
    whole: list[Any] = []
    open_part: Any = None
    for message in messages:
        piece = copied(message)
        piece.ClearField("sequence")
        kind = piece.WhichOneof("event")
        if open_part is not None:
            open_part.MergeFrom(getattr(piece, kind))
        else:
            whole.append(piece)
        part = getattr(whole[-1], kind)
        open_part = part if kind in {"layer", "matrix"} and not part.last else None
    return [timeless(piece) for piece in whole]


def cuts(count: int) -> list[int]:
    """Return the numbers of messages to receive before the interruption: all, or five of them."""
    return sorted({round(i * (count - 1) / 4) for i in range(5)} if count > 10 else range(count))


@pytest.mark.parametrize("case", CASES)
def test_joined_stream_equals_the_uninterrupted_one(stub: Any, case: str) -> None:
    method, splice_of, assembler_of, request = CASES[case]
    ask = getattr(stub, method)
    whole = list(ask(request))
    for cut in cuts(len(whole)):
        splice, assembler = splice_of(request), assembler_of()
        messages = joined(splice, whole[:cut])
        messages += joined(splice, ask(splice.rest()))
        for message in messages:
            assembler.feed(message)
        assert parts(messages) == parts(whole), f"cut after {cut} messages"
        assert assembler.result().summary is not None


def test_stream_can_be_interrupted_repeatedly(stub: Any) -> None:
    request = TRACES["layers apart"]
    whole = list(stub.Trace(request))
    splice, messages = TraceSplice(request), []
    for came in (1, 2, 3, 0, 1):
        part = list(stub.Trace(splice.rest()))
        messages += joined(splice, part[:came])
    messages += joined(splice, stub.Trace(splice.rest()))
    assert parts(messages) == parts(whole)


def test_only_missing_layers_are_requested(stub: Any) -> None:
    request = TRACES["all layers"]
    whole = list(stub.Trace(request))
    splice = TraceSplice(request)
    joined(splice, whole[:3])
    rest = splice.rest()
    assert list(rest.layers) == [2, 3]
    assert rest.revision == whole[0].header.provenance.revision
    assert list(rest.target.token_ids.ids) == [whole[0].header.targets[0].target_token_id]
    apart = TraceSplice(TRACES["layers apart"])
    joined(apart, list(stub.Trace(TRACES["layers apart"]))[:2])
    assert list(apart.rest().layers) == [0, 2, 3]  # the GAP edge begins at layer 0
    usual = GradientSplice(GRADIENTS["usual"])
    joined(usual, list(stub.GradientLens(GRADIENTS["usual"]))[:4])
    assert list(usual.rest().layers) == [0, 1, 2]


def test_streams_of_different_results_are_not_joined(stub: Any) -> None:
    whole = list(stub.Trace(TRACES["all layers"]))
    for change in (
        lambda header: setattr(header.provenance, "revision", "other"),
        lambda header: setattr(header.targets[0], "target_token_id", 3),
        lambda header: header.prompt_tokens.pop(),
    ):
        splice, other = TraceSplice(TRACES["all layers"]), copied(whole[0])
        joined(splice, whole[:2])
        splice.rest()
        change(other.header)
        with pytest.raises(DifferentAnswer, match="the other replica has"):
            splice.take(other)
