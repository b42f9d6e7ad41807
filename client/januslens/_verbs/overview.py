"""What surrounds a trace: the residual stream at every position, for the trace's page."""

from __future__ import annotations

from januslens._results.kinds import Lens, NodeKind
from januslens._results.trace import Trace
from januslens._stream.trace import TraceEvent
from januslens._verbs.calls import StreamCall
from januslens._verbs.trace import trace as trace_call
from januslens.v1 import trace_pb2

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
    return trace_call(
        [token.id for token in trace.prompt_tokens],
        targets.pop() if len(targets) == 1 else None,
        layers=trace.header.layers,
        positions=range(max(0, positions - _CELLS // layers), positions),
        heads=_HEADS,
        memory_values=1,
        top_k=top_k,
        bottom_k=0,
        lens=lens,
        node_kinds=_kinds(layers * positions),
        model=trace.provenance.model,
        revision=trace.provenance.revision,
        timeout=timeout,
    )


def _kinds(cells: int) -> tuple[NodeKind, ...]:
    if cells <= _CELLS_WITH_HEADS:
        return _RESIDUALS + _STEPS + _ATTENTION
    return _RESIDUALS + _STEPS if cells <= _CELLS_WITH_STEPS else _RESIDUALS
