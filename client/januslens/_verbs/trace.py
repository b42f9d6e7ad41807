"""The flow graph of a forward pass."""

from __future__ import annotations

from collections.abc import Iterable

from januslens._requests.inputs import (
    Layers,
    Positions,
    Prompt,
    TargetLike,
    input_message,
    layer_numbers,
    optional_count,
    position_numbers,
    target_message,
)
from januslens._results.kinds import LENSES, NODE_KINDS, Lens, NodeKind
from januslens._results.trace import Trace
from januslens._stream.trace import TraceAssembler, TraceEvent
from januslens._stream.trace_splice import TraceSplice
from januslens._verbs.calls import StreamCall
from januslens.v1 import trace_pb2


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
