"""Test the sentences about a trace, on streams written by hand."""

from __future__ import annotations

from januslens.assemblers import TraceAssembler
from januslens.cli.tables import console
from januslens.cli.trace import show_trace, story
from tests.client import messages
from tests.client import presentation_fixtures as fixtures
from tests.client.messages import trace_stream


def told(*hidden: str) -> str:
    """Return the sentences about the trace, without the nodes of some kinds."""
    layer = messages.layer()
    kept = [node for node in layer.nodes if not node.id.endswith(hidden)]
    ids = {node.id for node in kept}
    edges = [edge for edge in layer.edges if {edge.source, edge.target} <= ids]
    del layer.nodes[:], layer.edges[:]
    layer.nodes.extend(kept)
    layer.edges.extend(edges)
    assembler = TraceAssembler()
    for response in trace_stream(messages.trace_header(), layer, messages.trace_summary()):
        assembler.feed(response)
    trace = assembler.result()
    out = console()
    with out.capture() as captured:
        out.print(story(trace, trace.target()))
    return captured.get()


def test_a_layer_with_a_residual_in_between_is_named_by_its_part() -> None:
    assert "Ranked first from layer 0's MLP onwards" in told()


def test_a_parallel_layer_is_named_by_both_parts() -> None:
    assert "Ranked first from layer 0's attention and MLP onwards" in told("RESIDUAL_MID")


def test_heads_of_a_mixer_are_listed_as_such() -> None:
    assembler = TraceAssembler()
    for response in fixtures.stream_of(fixtures.with_mixer_heads()):
        assembler.feed(response)
    out = console()
    with out.capture() as captured:
        show_trace(assembler.result(), out, 3, details=True)
        show_trace(assembler.result(), out, 3, details=False)
    details, summary = captured.get().split("Heads that add most")
    assert "Layer 0: heads of the mixer" in details
    assert "eurons" not in details + summary  # the layer has none
    for text in (details, summary):
        assert "+1.50   75 %  L0 head 0 of the mixer" in text
