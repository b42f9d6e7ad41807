"""Test the conversion of Python arguments to request messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from januslens import (
    Chat,
    Client,
    DescentStep,
    ForwardShift,
    KlDivergence,
    Lens,
    LogitDifference,
    MatrixKind,
    NodeKind,
    Probe,
    Text,
    _requests,
)
from januslens.assemblers import TraceAssembler
from januslens.v1 import common_pb2, edits_pb2, gradient_lens_pb2, lens_pb2, trace_pb2
from tests.client import messages

NAN, INF = float("nan"), float("inf")


# Untyped, because some tests pass arguments of wrong types.
trace: Callable[..., trace_pb2.TraceRequest] = _requests.trace_request
gradient: Callable[..., gradient_lens_pb2.GradientLensRequest] = _requests.gradient_lens_request
project: Callable[..., lens_pb2.ProjectRequest] = _requests.project_request
preview: Callable[..., edits_pb2.PreviewEditRequest] = _requests.preview_edit_request


def test_a_plain_trace_leaves_everything_to_the_server_but_logit_contributions() -> None:
    expected = trace_pb2.TraceRequest(
        lens=lens_pb2.LENS_FINAL_NORM, include_logit_contribution=True
    )
    expected.input.prompt = "x"
    expected.selection.SetInParent()
    assert trace("x") == expected


def test_text_and_token_ids_are_distinguished() -> None:
    request = trace([5, 6], " c")
    assert list(request.input.token_ids.ids) == [5, 6]
    assert request.target.text == " c"
    assert list(trace("x", 7).target.token_ids.ids) == [7]
    assert list(trace("x", np.int64(7)).target.token_ids.ids) == [7]
    assert list(trace(np.array([1, 2]), [7]).input.token_ids.ids) == [1, 2]


def test_messages_are_sent_as_a_chat_wherever_a_prompt_is_taken() -> None:
    said = [{"role": "user", "content": "Hi"}]
    request = trace(messages=said)
    assert [(m.role, m.content) for m in request.input.chat.messages] == [("user", "Hi")]
    assert request.input.WhichOneof("input") == "chat"
    assert trace(Chat(said)) == request
    assert gradient(messages=said, target="x").input == request.input
    assert preview(Chat(said), "x", ForwardShift(0, 1.0)).input == request.input
    continued = trace(messages=Chat(said, continue_final_message=True))
    assert continued.input.chat.continue_final_message


@pytest.mark.parametrize(
    ("prompt", "messages", "error", "words"),
    [
        (None, None, ValueError, "no prompt and no messages given"),
        ("x", [{"role": "user", "content": "y"}], ValueError, "both given"),
        (None, [], ValueError, "messages is empty"),
        (None, "Hi", TypeError, "expected a list of messages"),
        (None, ["Hi"], TypeError, r"messages\[0\]"),
        (None, [{"role": "user"}], ValueError, "expected role and content"),
        (None, [{"role": "user", "content": "y", "name": "z"}], ValueError, "expected role"),
        (None, [{"role": "user", "content": ["y"]}], TypeError, r"messages\[0\]\.content"),
        (None, [{"role": "user", "content": "\udc80"}], ValueError, "lone surrogate"),
    ],
)
def test_invalid_messages_are_refused_before_they_are_sent(
    prompt: object, messages: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        trace(prompt, messages=messages)


def test_empty_prompt_is_sent_to_the_server() -> None:
    assert trace("").input.WhichOneof("input") == "prompt"


@pytest.mark.parametrize(
    ("layers", "sent"),
    [
        (None, []),
        (2, [2]),
        ([3, 1, 3], [1, 3]),
        (range(2, 4), [2, 3]),
        (slice(2), [0, 1]),
        (slice(0, 6, 2), [0, 2, 4]),
        (-1, [-1]),
        (slice(-3, -1), [-3, -2]),
        (slice(-2, None), [-2, -1]),
        (np.arange(2), [0, 1]),
        ((n for n in (1, 0)), [0, 1]),
    ],
)
def test_layers_in_every_form(layers: Any, sent: list[int]) -> None:
    assert list(trace("x", layers=layers).layers) == sent
    assert len(trace("x", layers=2).layers) == 1


@pytest.mark.parametrize(
    ("positions", "sent", "every"),
    [(None, [], False), (-1, [-1], False), ([0, -2, 0], [0, -2], False), ("all", [], True)],
)
def test_positions_in_every_form(positions: Any, sent: list[int], every: bool) -> None:
    request = trace("x", positions=positions)
    assert list(request.positions) == sent
    assert request.all_positions is every


def test_zero_is_sent_and_none_is_not() -> None:
    request = trace("x", heads=0, top_k=0)
    assert request.selection.HasField("heads")
    assert request.HasField("top_k")
    assert not request.selection.HasField("top_neurons")
    assert not request.HasField("bottom_k")


def test_names_become_numbers() -> None:
    request = trace("x", lens="raw", node_kinds=["head_output", NodeKind.OTHER])
    assert request.lens == lens_pb2.LENS_RAW
    assert list(request.node_kinds) == [
        trace_pb2.NODE_KIND_HEAD_OUTPUT,
        trace_pb2.NODE_KIND_OTHER,
    ]


def test_target_selects_negative_log_likelihood() -> None:
    request = gradient("x", " c", matrices=["ff1", MatrixKind.Q], lens=Lens.NORMALIZED)
    assert request.nll.target.text == " c"
    assert list(request.matrices) == [
        gradient_lens_pb2.MATRIX_KIND_FF1,
        gradient_lens_pb2.MATRIX_KIND_Q,
    ]
    assert request.lens == lens_pb2.LENS_NORMALIZED


def test_the_other_losses() -> None:
    difference = gradient("x", loss=LogitDifference(" c", 4)).logit_difference
    assert difference.preferred.text == " c"
    assert list(difference.other.token_ids.ids) == [4]
    assert list(gradient("x", loss=KlDivergence([3, 4])).kl.suppressed.ids) == [3, 4]
    divergence = gradient("x", loss=KlDivergence([" c", 4])).kl
    assert (list(divergence.suppressed.ids), divergence.tokens[0].text) == ([4], " c")
    assert gradient("x", loss=KlDivergence(" c")).kl.tokens[0].text == " c"


@pytest.mark.parametrize("subject", [(1, 3), range(1, 3)])
def test_a_subject_as_positions(subject: Any) -> None:
    span = gradient("x", " c", subject=subject).subject.span
    assert (span.start, span.end) == (1, 3)
    assert gradient("x", " c", subject="Japan").subject.text == "Japan"


def test_a_learning_rate_of_zero_is_sent() -> None:
    assert gradient("x", " c", learning_rate=0.0).HasField("learning_rate")
    assert not gradient("x", " c").HasField("learning_rate")


def test_edits() -> None:
    step = preview("x", " c", DescentStep(0.5, ["ff2"], range(2))).descent
    assert (step.learning_rate, list(step.layers)) == (0.5, [0, 1])
    assert list(step.matrices) == [gradient_lens_pb2.MATRIX_KIND_FF2]
    shift = preview("x", " c", ForwardShift(3, eta=0.25)).shift
    assert (shift.layer, shift.eta, shift.include_gradient_cosine) == (3, 0.25, False)
    assert preview("x", " c", ForwardShift(3, 1, True)).shift.include_gradient_cosine
    grid = _requests.preview_edits_request("x", " c", etas=[1], gradient_cosine=True)
    assert grid.shift.include_gradient_cosine


def test_a_probe_that_is_a_prompt_is_its_own_label() -> None:
    first, second = preview("x", " c", ForwardShift(0, 1), probes=["y", Probe([4], 5)]).probes
    assert (first.label, first.input.prompt, first.HasField("target")) == ("y", "y", False)
    assert (second.label, list(second.target.token_ids.ids)) == ("", [5])


def test_vectors_travel_as_rows() -> None:
    assert list(project([1.0, 2.0]).vectors.shape) == [1, 2]
    assert list(project(np.zeros((3, 4))).vectors.shape) == [3, 4]


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda: trace([]), ValueError, "prompt is empty"),
        (lambda: trace([-1]), ValueError, "token ids of prompt: -1 is not between 0 and"),
        (lambda: trace([1.0]), TypeError, "token ids of prompt: 1.0 is not an integer"),
        (
            lambda: trace([{"role": "user"}]),
            TypeError,
            "give a conversation as messages=",
        ),
        (lambda: trace(["x", "y"]), TypeError, "several prompts one after the other"),
        (lambda: trace(b"x"), TypeError, "invalid prompt b'x'; expected text or token ids"),
        (lambda: trace("x", ""), ValueError, "target is empty"),
        (lambda: trace("x", True), TypeError, "token ids of target: True is not an integer"),
        (lambda: trace("x", layers=[]), ValueError, "layers is empty"),
        (lambda: trace("x", layers=2**31), ValueError, "layers: 2147483648 is not between"),
        (lambda: trace("x", layers="0"), TypeError, "invalid layers '0'; expected integers"),
        (
            lambda: trace("x", layers=slice(1, None)),
            ValueError,
            r"expected a slice such as slice\(0, 4\)",
        ),
        (
            lambda: trace("x", layers=slice(-2, 4)),
            ValueError,
            r"expected a slice such as slice\(0, 4\)",
        ),
        (lambda: trace("x", positions="last"), ValueError, 'or "all"'),
        (lambda: trace("x", positions=[2**31]), ValueError, "positions: 2147483648 is not between"),
        (lambda: trace("x", heads=-1), ValueError, "heads: -1 is not"),
        (lambda: trace("x", top_k=2.5), TypeError, "top_k: 2.5 is not an integer"),
        (lambda: trace("x", lens="sharp"), ValueError, "FINAL_NORM"),
        (lambda: trace("x", node_kinds=[]), ValueError, "at least one kind"),
        (lambda: gradient("x"), ValueError, "no target and no loss given"),
        (
            lambda: gradient("x", " c", loss=KlDivergence([1])),
            ValueError,
            "target and loss are both given",
        ),
        (lambda: gradient("x", loss="nll"), TypeError, "LogitDifference"),
        (lambda: gradient("x", loss=KlDivergence([])), ValueError, "suppressed"),
        (lambda: gradient("x", " c", matrices=[]), ValueError, "at least one kind"),
        (lambda: gradient("x", " c", subject=""), ValueError, "subject is empty"),
        (lambda: gradient("x", " c", subject=(2, 2)), ValueError, "start < end"),
        (lambda: gradient("x", " c", neurons=-1), ValueError, "neurons: -1 is not"),
        (lambda: preview("x", "", ForwardShift(0, 1)), ValueError, "target is empty"),
        (lambda: preview("x", " c", 0.1), TypeError, "a DescentStep or a ForwardShift"),
        (
            lambda: preview("x", " c", ForwardShift(2**31, 1)),
            ValueError,
            "layer: 2147483648 is not between",
        ),
        (lambda: preview("x", " c", DescentStep(1, [])), ValueError, "at least one kind"),
        (
            lambda: preview("x", " c", DescentStep(NAN)),
            ValueError,
            "invalid learning_rate nan; expected a finite number",
        ),
        (lambda: preview("x", " c", DescentStep(0.0)), ValueError, "invalid learning_rate 0.0"),
        (lambda: preview("x", " c", ForwardShift(0, INF)), ValueError, "invalid eta inf"),
        (
            lambda: preview("x", " c", ForwardShift(0, 1e-60)),
            ValueError,
            "a number other than 0",
        ),
        (
            lambda: preview("x", " c", ForwardShift(0, True)),
            TypeError,
            "invalid eta True; expected",
        ),
        (lambda: gradient("x", " c", learning_rate=NAN), ValueError, "invalid learning_rate nan"),
        (lambda: gradient("x", " c", learning_rate=1e39), ValueError, "finite number in float32"),
        (lambda: project([1.0, NAN]), ValueError, "infinity or NaN in float32"),
        (lambda: project([1.0, 1e39]), ValueError, "infinity or NaN in float32"),
        (
            lambda: project(np.array([INF], np.float16)),
            ValueError,
            "infinity or NaN in float32",
        ),
        (lambda: project(np.zeros((1, 1, 1))), ValueError, r"\[n, d_model\]"),
        (lambda: project([]), ValueError, r"\[n, d_model\]"),
        (lambda: project(["x"]), TypeError, "real numbers"),
    ],
)
def test_invalid_arguments_are_refused_before_sending(
    ask: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ask()


LONE_SURROGATE = "a\udcff"  # what Python makes of an argument that is not UTF-8


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("prompt", trace),
        ("prompt", lambda text: trace(Text(text))),
        ("target", lambda text: trace("x", text)),
        ("target", lambda text: trace("x", Text(text))),
        ("preferred", lambda text: gradient("x", loss=LogitDifference(text, " c"))),
        ("subject", lambda text: gradient("x", " c", subject=text)),
        ("prompt", lambda text: preview("x", " c", ForwardShift(0, 1), probes=[text])),
        (
            "label",
            lambda text: preview("x", " c", ForwardShift(0, 1), probes=[Probe("y", label=text)]),
        ),
        ("token", _requests.find_neurons_request),
        ("model", lambda text: trace("x", model=text)),
        ("revision", lambda text: gradient("x", " c", revision=text)),
        ("address", Client),
        ("token", lambda text: Client(token=text)),
    ],
)
def test_lone_surrogates_are_refused_with_their_position(
    name: str, ask: Callable[[str], object]
) -> None:
    message = rf"invalid {name}: character 1 is the lone surrogate '\\udcff'; expected valid"
    with pytest.raises(ValueError, match=message):
        ask(LONE_SURROGATE)


@pytest.mark.parametrize("token", ["ä", "line\n", "\0"])
def test_tokens_that_metadata_cannot_hold_are_refused_unseen(token: str) -> None:
    with pytest.raises(ValueError, match=r"^invalid token; expected printable ASCII characters$"):
        Client(token=token)
    with pytest.raises(TypeError, match=r"^invalid token of type bytes; expected str$"):
        Client(token=token.encode())  # type: ignore[arg-type]  # as a careless caller would


@pytest.mark.parametrize(
    ("n_layers", "layers", "limited", "named", "most"),
    [
        (2, [0, 1], {}, [], NodeKind.MEMORY_VALUE),
        (2, [1], {}, [1], NodeKind.MEMORY_VALUE),
        (2, [0, 1], {0: "SUBLAYERS"}, [], NodeKind.MEMORY_VALUE),
        (2, [0, 1], {0: "SUBLAYERS", 1: "SUBLAYERS"}, [], NodeKind.MIXER_OUTPUT),
        (3, [0, 1], {0: "SUBLAYERS"}, [0, 1], NodeKind.MIXER_OUTPUT),
        (3, [0, 1], {0: "SUBLAYERS", 1: "STREAM"}, [0, 1], NodeKind.BLOCK_OUTPUT),
    ],
)
def test_an_overview_names_no_kind_that_a_named_layer_lacks(
    n_layers: int, layers: list[int], limited: dict[int, str], named: list[int], most: NodeKind
) -> None:
    """The server refuses a kind that a named layer lacks, and kinds that every layer lacks."""
    header = messages.trace_header()
    header.sizes.n_layers = n_layers
    header.layers[:] = layers
    for layer, level in limited.items():
        header.limited_layers.add(layer=layer, level=common_pb2.Level.Value(f"LEVEL_{level}"))
    assembler = TraceAssembler()
    for response in messages.trace_stream(header, messages.trace_summary()):
        assembler.feed(response)
    request = _requests.overview_request(assembler.result())
    assert list(request.layers) == named
    kinds = {trace_pb2.NodeKind.Name(kind) for kind in request.node_kinds}
    every = (NodeKind.MEMORY_VALUE, NodeKind.MIXER_OUTPUT, NodeKind.BLOCK_OUTPUT)
    shown = {kind for kind in every if f"NODE_KIND_{kind}" in kinds}
    assert shown == set(every[every.index(most) :])
