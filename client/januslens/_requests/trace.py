"""Arguments of a trace."""

from __future__ import annotations

from collections.abc import Iterable

from januslens._requests.inputs import (
    Layers,
    Positions,
    Prompt,
    TargetLike,
    count,
    input_message,
    layer_numbers,
    position_numbers,
    target_message,
)
from januslens._results.kinds import LENSES, NODE_KINDS, Lens, NodeKind
from januslens.v1 import trace_pb2


def trace_request(  # noqa: PLR0913 - one request, every field by name
    prompt: Prompt,
    target: TargetLike | None,
    *,
    layers: Layers | None,
    positions: Positions | None,
    heads: int | None,
    memory_values: int | None,
    top_neurons: int | None,
    bottom_neurons: int | None,
    top_k: int | None,
    bottom_k: int | None,
    lens: Lens | str,
    node_kinds: Iterable[NodeKind | str] | None,
    vectors: bool,
    logit_contribution: bool,
    overlap_k: int | None,
    allow_batching: bool,
    model: str,
    revision: str,
) -> trace_pb2.TraceRequest:
    """The request; `januslens.Client.trace` says what each argument means.

    Raises:
        TypeError: An argument has a type that no request can hold.
        ValueError: An argument has a value that no server could accept.
    """
    numbers, all_positions = position_numbers(positions)
    return trace_pb2.TraceRequest(
        model=model,
        revision=revision,
        input=input_message(prompt),
        target=None if target is None else target_message(target),
        layers=layer_numbers(layers),
        positions=numbers,
        all_positions=all_positions,
        selection=_selection(heads, memory_values, top_neurons, bottom_neurons),
        top_k=count(top_k, "top_k"),
        bottom_k=count(bottom_k, "bottom_k"),
        lens=LENSES.number(Lens.of(lens)),
        node_kinds=[NODE_KINDS.number(kind) for kind in _kinds(node_kinds)],
        include_vectors=vectors,
        include_logit_contribution=logit_contribution,
        overlap_k=count(overlap_k, "overlap_k"),
        allow_batching=allow_batching,
    )


def _selection(
    heads: int | None,
    memory_values: int | None,
    top_neurons: int | None,
    bottom_neurons: int | None,
) -> trace_pb2.Selection:
    return trace_pb2.Selection(
        heads=count(heads, "heads"),
        memory_values_per_head=count(memory_values, "memory_values"),
        top_neurons=count(top_neurons, "top_neurons"),
        bottom_neurons=count(bottom_neurons, "bottom_neurons"),
    )


def _kinds(kinds: Iterable[NodeKind | str] | None) -> list[NodeKind]:
    """None = all; an empty list would mean that too, and surely was not meant."""
    if kinds is None:
        return []
    named = [NodeKind.of(kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    if not named:
        raise ValueError("expected at least one kind for node_kinds; got none")
    return named
