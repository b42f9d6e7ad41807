"""The calls that a client can make: their requests, and how their responses are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from januslens._assemblers import GradientAssembler, GradientEvent, TraceAssembler, TraceEvent
from januslens._requests import (
    Edit,
    Layers,
    Loss,
    NegativeLogLikelihood,
    Positions,
    Probe,
    Prompt,
    TargetLike,
    count,
    finite_number,
    input_message,
    layer_numbers,
    matrix_numbers,
    optional_count,
    position_numbers,
    probe_message,
    set_edit,
    set_loss,
    target_message,
)
from januslens._results.edits import EditPreview
from januslens._results.gradient import Gradient
from januslens._results.kinds import LENSES, NODE_KINDS, Lens, MatrixKind, NodeKind
from januslens._results.models import CostEstimate, Model, Models
from januslens._results.neurons import FoundNeurons
from januslens._results.tokens import Token, Tokens, TokenTable
from januslens._results.trace import Trace
from januslens._results.vectors import Projection, Projections, Tensor, tensor_message
from januslens._resuming import Exchange, GradientSplice, StreamCall, TraceSplice, UnaryCall
from januslens.v1 import (
    cost_pb2,
    edits_pb2,
    gradient_lens_pb2,
    lens_pb2,
    models_pb2,
    neurons_pb2,
    trace_pb2,
)


def list_models(*, timeout: float | None = None) -> Exchange[Models]:
    """The configured models with their state, sizes and what their self-checks measured.

    Args:
        timeout: Seconds to wait.

    Raises:
        JanuslensError: The call failed; see `januslens.errors` for the kinds.
    """
    models = Models()
    page_token = ""
    while True:
        request = models_pb2.ListModelsRequest(page_token=page_token)
        page: models_pb2.ListModelsResponse = yield UnaryCall("ListModels", request, timeout)
        models += [Model.from_message(model) for model in page.models]
        page_token = page.next_page_token
        if not page_token:
            return models


def tokenize(
    text: str,
    *,
    special_tokens: bool = False,
    literal: bool = False,
    model: str = "",
    timeout: float | None = None,
) -> Exchange[Tokens]:
    """The tokens of a text as a model reads it, with the characters that each one covers.

    Args:
        text: What to tokenize.
        special_tokens: Read it as a prompt, with the tokenizer's special tokens, and not as a
            target, whose spaces are its own.
        literal: Read its characters as characters, even where they spell a control token.
        model: Its name; empty = the only one resident.
        timeout: Seconds to wait.

    Raises:
        JanuslensError: The call failed; see `januslens.errors` for the kinds.
    """
    request = models_pb2.TokenizeRequest(
        model=model, text=text, with_special_tokens=special_tokens, literal=literal
    )
    response: models_pb2.TokenizeResponse = yield UnaryCall("Tokenize", request, timeout)
    return Tokens(Token.from_message(token) for token in response.tokens)


# The most that a server gives in one page.
_PAGE = 1000


def find_neurons(
    token: TargetLike,
    *,
    suppressed: bool = False,
    layers: Layers | None = None,
    limit: int | None = 20,
    model: str = "",
    revision: str = "",
    timeout: float | None = None,
) -> Exchange[FoundNeurons]:
    """The MLP neurons whose value, their row of FF2, promotes a token; no prompt is run.

    The first question about a layer may take long: the server reads all of its neurons for it.

    Args:
        token: Literal text that is one token (a leading space counts), or its id.
        suppressed: Those that push the token to the bottom instead.
        layers: Which blocks, from 0; None = all.
        limit: How many neurons at most, the best first; None = all that there are.
        model: Its name; empty = the only one resident.
        revision: Refuse any other than this one; empty = whatever is resident.
        timeout: Seconds to wait for each page of a thousand.

    Raises:
        TypeError: An argument has a type that no request can hold.
        ValueError: An argument has a value that no server could accept.
        JanuslensError: The call failed; see `januslens.errors` for the kinds.
    """
    wanted = optional_count(limit, "limit")
    if wanted == 0:
        raise ValueError("expected a limit of at least 1, or None; got 0")
    request = neurons_pb2.FindNeuronsRequest(
        model=model,
        revision=revision,
        token=target_message(token, "the token"),
        suppressed=suppressed,
        layers=layer_numbers(layers),
    )
    pages: list[neurons_pb2.FindNeuronsResponse] = []
    for size in _page_sizes(wanted):
        request.page_size = size
        pages.append((yield UnaryCall("FindNeurons", request, timeout)))
        request.page_token = pages[-1].next_page_token
        if not request.page_token:
            break
    return FoundNeurons.from_messages(pages, suppressed=suppressed)


def _page_sizes(wanted: int | None) -> Iterator[int]:
    """Pages that add up to `wanted`, or without end."""
    left = wanted
    while left is None or left > 0:
        yield _PAGE if left is None else min(left, _PAGE)
        left = None if left is None else left - _PAGE


def project(
    vectors: ArrayLike,
    *,
    target: TargetLike | None = None,
    lens: Lens | str = Lens.FINAL_NORM,
    top_k: int | None = None,
    bottom_k: int | None = None,
    model: str = "",
    timeout: float | None = None,
) -> Exchange[Projections]:
    """Vectors of your own, e.g. probes or dictionary features, through a model's lens.

    Args:
        vectors: `[d_model]` or `[n, d_model]`, in the basis of the residual stream.
        target: The one token (literal text or id) whose rank is to be reported.
        lens: `FINAL_NORM`, `NORMALIZED` (each vector scaled to length 1 first) or `RAW`.
        top_k: How many of the most likely tokens; None = the server's default, 0 = none.
        bottom_k: How many of the least likely tokens, likewise.
        model: Its name; empty = the only one resident.
        timeout: Seconds to wait.

    Returns:
        One projection a vector.

    Raises:
        TypeError: The vectors are not real numbers.
        ValueError: They have another shape, or an argument is impossible.
        JanuslensError: The call failed; see `januslens.errors` for the kinds.
    """
    rows = np.asarray(vectors)
    if rows.ndim not in (1, 2) or rows.size == 0:
        raise ValueError(f"expected vectors of shape [d_model] or [n, d_model]; got {rows.shape}")
    sent = tensor_message(np.atleast_2d(rows))
    if not np.isfinite(Tensor.from_message(sent).float32()).all():
        raise ValueError("vectors must be finite in float32; they hold infinity or NaN")
    request = lens_pb2.ProjectRequest(
        model=model,
        vectors=sent,
        lens=LENSES.number(Lens.of(lens)),
        target=None if target is None else target_message(target),
        top_k=optional_count(top_k, "top_k"),
        bottom_k=optional_count(bottom_k, "bottom_k"),
    )
    response: lens_pb2.ProjectResponse = yield UnaryCall("Project", request, timeout)
    tokens = TokenTable(response.tokens)
    return Projections(Projection.from_message(found, tokens) for found in response.projections)


def preview_edit(
    prompt: Prompt,
    target: TargetLike,
    edit: Edit,
    *,
    probes: Iterable[Probe | str] = (),
    model: str = "",
    revision: str = "",
    timeout: float | None = None,
) -> Exchange[EditPreview]:
    """What an edit would do to the prompt and to others; the model stays as it is.

    Args:
        prompt: The prompt that the edit is made for, as text or token ids.
        target: What the edited model should say: literal text (a leading space counts), one id
            or several, of which the first is reported.
        edit: A `DescentStep` or a `ForwardShift`.
        probes: Other prompts to look at before and after.
        model: Its name; empty = the only one resident.
        revision: Refuse any other than this one; empty = whatever is resident.
        timeout: Seconds to wait.

    Raises:
        TypeError: An argument has a type that no request can hold.
        ValueError: An argument has a value that no server could accept.
        JanuslensError: The call failed; see `januslens.errors` for the kinds.
    """
    request = edits_pb2.PreviewEditRequest(
        model=model,
        revision=revision,
        input=input_message(prompt),
        target=target_message(target),
        probes=[probe_message(probe) for probe in probes],
    )
    set_edit(request, edit)
    response: edits_pb2.PreviewEditResponse = yield UnaryCall("PreviewEdit", request, timeout)
    return EditPreview.from_message(response)


def trace(  # noqa: PLR0913 - by keyword
    prompt: Prompt,
    target: TargetLike | None = None,
    *,
    layers: Layers | None = None,
    positions: Positions | None = None,
    heads: int | None = None,
    memory_values: int | None = None,
    top_neurons: int | None = None,
    bottom_neurons: int | None = None,
    top_k: int | None = None,
    bottom_k: int | None = None,
    lens: Lens | str = Lens.FINAL_NORM,
    node_kinds: Iterable[NodeKind | str] | None = None,
    vectors: bool = False,
    logit_contribution: bool = True,
    overlap_k: int | None = None,
    checks: bool = False,
    model: str = "",
    revision: str = "",
    timeout: float | None = None,
) -> StreamCall[trace_pb2.TraceResponse, TraceEvent, Trace]:
    """The flow graph of a forward pass, every vector read in the vocabulary (VISIT).

    Args:
        prompt: Text, which gets the tokenizer's special tokens, or token ids as they are.
        target: The one token whose rank every projection reports, as literal text (a leading
            space counts) or id; None = the model's own next token at each position.
        layers: Which blocks, from 0; None = all.
        positions: Which query positions, negative from the end, or `"all"`; None = the last.
        heads: How many heads of each block, by norm. None = the server's default, 0 = all.
        memory_values: How many sources of each head, by attention. Likewise.
        top_neurons: How many neurons of each MLP, by activation times norm. Likewise.
        bottom_neurons: How many of the most negative ones. None = the default, 0 = none.
        top_k: How many of the most likely tokens a projection; None = the default, 0 = none.
        bottom_k: How many of the least likely tokens, likewise.
        lens: `FINAL_NORM`, `NORMALIZED` (each vector scaled to length 1 first) or `RAW`.
        node_kinds: Kinds to send; None = all. Hides nodes, never changes sums.
        vectors: Send the vectors themselves too.
        logit_contribution: Send what each part adds to the target's logit.
        overlap_k: Send the edges' intersection score over this many top tokens.
        checks: Repeat in the summary what the model's self-check measured.
        model: Its name; empty = the only one resident.
        revision: Refuse any other than this one; empty = whatever is resident.
        timeout: Seconds for the whole stream.

    Raises:
        TypeError: An argument has a type that no request can hold.
        ValueError: An argument has a value that no server could accept.
        TraceInterrupted: The stream was cut; its `partial` is the trace so far.
        JanuslensError: The call failed; see `januslens.errors` for the kinds.
    """
    numbers, all_positions = position_numbers(positions)
    request = trace_pb2.TraceRequest(
        model=model,
        revision=revision,
        input=input_message(prompt),
        target=None if target is None else target_message(target),
        layers=layer_numbers(layers),
        positions=numbers,
        all_positions=all_positions,
        selection=_selection(heads, memory_values, top_neurons, bottom_neurons),
        top_k=optional_count(top_k, "top_k"),
        bottom_k=optional_count(bottom_k, "bottom_k"),
        lens=LENSES.number(Lens.of(lens)),
        node_kinds=[NODE_KINDS.number(kind) for kind in _kinds(node_kinds)],
        include_vectors=vectors,
        include_logit_contribution=logit_contribution,
        overlap_k=optional_count(overlap_k, "overlap_k"),
        include_checks=checks,
    )
    return StreamCall("Trace", request, timeout, TraceAssembler(), TraceSplice(request))


def _selection(
    heads: int | None,
    memory_values: int | None,
    top_neurons: int | None,
    bottom_neurons: int | None,
) -> trace_pb2.Selection:
    return trace_pb2.Selection(
        heads=optional_count(heads, "heads"),
        memory_values_per_head=optional_count(memory_values, "memory_values"),
        top_neurons=optional_count(top_neurons, "top_neurons"),
        bottom_neurons=optional_count(bottom_neurons, "bottom_neurons"),
    )


def _kinds(kinds: Iterable[NodeKind | str] | None) -> list[NodeKind]:
    """None = all; an empty list would mean that too, and surely was not meant."""
    if kinds is None:
        return []
    named = [NodeKind.of(kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    if not named:
        raise ValueError("expected at least one kind for node_kinds; got none")
    return named


_RESIDUALS = (NodeKind.BLOCK_INPUT, NodeKind.BLOCK_OUTPUT)
_STEPS = (NodeKind.RESIDUAL_MID, NodeKind.ATTENTION_OUTPUT, NodeKind.MLP_OUTPUT)
_ATTENTION = (
    NodeKind.ATTENTION_CONCAT,
    NodeKind.ATTENTION_SUM,
    NodeKind.HEAD_OUTPUT,
    NodeKind.MEMORY_VALUE,
)
_HEADS = 3  # of each cell, with the one source that each attends to most

# A cell is one layer at one position. Up to so many, a cell also brings its strongest heads; up to
# so many, the steps between residuals; above, the earliest positions are left out.
_CELLS_WITH_HEADS = 300
_CELLS_WITH_STEPS = 1_000
_CELLS = 5_000


_trace_call = trace  # `trace_overview` has an argument of that name


def trace_overview(
    trace: Trace,
    *,
    lens: Lens | str = Lens.FINAL_NORM,
    top_k: int | None = 3,
    timeout: float | None = None,
) -> StreamCall[trace_pb2.TraceResponse, TraceEvent, Trace]:
    """The residual stream around a trace: every position, but few nodes at each.

    For `trace.to_html(overview)`. The same model, prompt, layers and target; where positions of the
    trace have different targets, the model's own next token at each position. Nodes that both have
    are equal. Short prompts get the strongest heads too, very long ones lose their beginning.

    Args:
        trace: What is to be surrounded.
        lens: The trace's own, which a trace does not say.
        top_k: How many of the most likely tokens a projection.
        timeout: Seconds for the whole stream.

    Raises:
        StreamInterrupted: The stream ended early; its `partial` is the trace so far.
        JanuslensError: The call failed; see `januslens.errors` for the kinds.
    """
    layers, positions = len(trace.header.layers), len(trace.prompt_tokens)
    targets = {target.target.id for target in trace.targets}
    return _trace_call(
        [token.id for token in trace.prompt_tokens],
        targets.pop() if len(targets) == 1 else None,
        layers=trace.header.layers,
        positions=range(max(0, positions - _CELLS // layers), positions),
        heads=_HEADS,
        memory_values=1,
        top_k=top_k,
        bottom_k=0,
        lens=lens,
        node_kinds=_overview_kinds(layers * positions),
        model=trace.provenance.model,
        revision=trace.provenance.revision,
        timeout=timeout,
    )


def _overview_kinds(cells: int) -> tuple[NodeKind, ...]:
    if cells <= _CELLS_WITH_HEADS:
        return _RESIDUALS + _STEPS + _ATTENTION
    return _RESIDUALS + _STEPS if cells <= _CELLS_WITH_STEPS else _RESIDUALS


SubjectLike = str | tuple[int, int] | range


def gradient_lens(  # noqa: PLR0913 - by keyword
    prompt: Prompt,
    target: TargetLike | None = None,
    *,
    loss: Loss | None = None,
    matrices: Iterable[MatrixKind | str] | None = None,
    layers: Layers | None = None,
    top_k: int | None = None,
    bottom_k: int | None = None,
    lens: Lens | str = Lens.FINAL_NORM,
    components: int | None = None,
    spectrum: int = 0,
    neurons: int = 0,
    learning_rate: float | None = None,
    subject: SubjectLike | None = None,
    factors: bool = False,
    verify: bool = False,
    model: str = "",
    revision: str = "",
    timeout: float | None = None,
) -> StreamCall[gradient_lens_pb2.GradientLensResponse, GradientEvent, Gradient]:
    """The gradient of every weight matrix as factors, read in the vocabulary (Backward Lens).

    Args:
        prompt: Text, which gets the tokenizer's special tokens, or token ids as they are.
        target: What the loss `-log p(target | prompt)` is of: literal text (a leading space
            counts), one id or several. Give this or `loss`.
        loss: Another loss: `LogitDifference`, `KlDivergence` or `NegativeLogLikelihood`.
        matrices: Kinds, e.g. `["FF1", "FF2"]`, which is also what None means; FF1 stands for
            GATE and UP where the MLP is gated.
        layers: Which blocks, from 0; None = all.
        top_k: How many of the most likely tokens a projection; None = the default, 0 = none.
        bottom_k: How many of the least likely tokens, likewise.
        lens: `FINAL_NORM`, `NORMALIZED` (the paper's answer to tiny VJPs) or `RAW`.
        components: How many factor pairs of each matrix, largest first; None = the server's
            default, 0 = all, which a dense gradient needs.
        spectrum: How many singular values and directions.
        neurons: How many of the neurons that a step moves most.
        learning_rate: The step's; None = only the direction of the neurons' change.
        subject: The prompt's subject, as text or token positions `(start, end)`: adds norms and
            ranks by segment.
        factors: Send the factors themselves, for `matrix.gradient()` and `gradient.save()`.
        verify: Compare each matrix with autograd's dense gradient.
        model: Its name; empty = the only one resident.
        revision: Refuse any other than this one; empty = whatever is resident.
        timeout: Seconds for the whole stream.

    Raises:
        TypeError: An argument has a type that no request can hold.
        ValueError: An argument has a value that no server could accept.
        GradientInterrupted: The stream was cut; its `partial` is the gradient so far.
        JanuslensError: The call failed; see `januslens.errors` for the kinds.
    """
    request = gradient_lens_pb2.GradientLensRequest(
        model=model,
        revision=revision,
        input=input_message(prompt),
        matrices=matrix_numbers(matrices),
        layers=layer_numbers(layers),
        top_k=optional_count(top_k, "top_k"),
        bottom_k=optional_count(bottom_k, "bottom_k"),
        lens=LENSES.number(Lens.of(lens)),
        components=optional_count(components, "components"),
        spectrum_rank=count(spectrum, "spectrum"),
        neurons=count(neurons, "neurons"),
        learning_rate=None
        if learning_rate is None
        else finite_number(learning_rate, "learning_rate"),
        subject=None if subject is None else _subject(subject),
        include_factors=factors,
        verify=verify,
    )
    set_loss(request, _one_loss(target, loss))
    return StreamCall(
        "GradientLens", request, timeout, GradientAssembler(), GradientSplice(request)
    )


def _one_loss(target: TargetLike | None, loss: Loss | None) -> Loss:
    if loss is None and target is not None:
        return NegativeLogLikelihood(target)
    if target is None and loss is not None:
        return loss
    given = "neither" if loss is None else "both"
    raise ValueError(f"expected either a target or a loss; got {given}")


def _subject(subject: SubjectLike) -> gradient_lens_pb2.Subject:
    """Text of the prompt, or token positions `(start, end)`, end excluded."""
    if isinstance(subject, str):
        if not subject:
            raise ValueError("expected some text for the subject; got none")
        return gradient_lens_pb2.Subject(text=subject)
    start, end = (subject.start, subject.stop) if isinstance(subject, range) else subject
    if not 0 <= start < end:
        raise ValueError(f"expected a subject of positions 0 <= start < end; got {start}, {end}")
    return gradient_lens_pb2.Subject(span=gradient_lens_pb2.Span(start=start, end=end))


ESTIMATE_SUMMARY = "What this would take, without running it; the arguments are the request's own."


def estimate(call: StreamCall[Any, Any, Any]) -> Exchange[CostEstimate]:
    """Ask for the cost of the call in place of making it."""
    request = cost_pb2.EstimateCostRequest()
    field = {"Trace": request.trace, "GradientLens": request.gradient_lens}[call.method]
    field.MergeFrom(call.request)
    field.SetInParent()
    response: cost_pb2.EstimateCostResponse = yield UnaryCall("EstimateCost", request, call.timeout)
    return CostEstimate.from_message(response)
