"""The trace in a few sentences, before its tables."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from januslens._results.graph import Part
from januslens._results.kinds import NodeKind
from januslens._results.nodes import Node
from januslens._results.trace import Trace
from januslens._results.trace_events import PositionTarget
from januslens._results.words import at
from januslens.cli.show.cells import probability_cell
from januslens.cli.show.heading import labelled

_UNRANKED = 2**32
_STEPS = {
    NodeKind.BLOCK_INPUT: "input",
    NodeKind.RESIDUAL_MID: "attention",
    NodeKind.BLOCK_OUTPUT: "MLP",
}


def story(trace: Trace, target: PositionTarget) -> Table:
    """The target, when it comes to the top, and which head and neuron add most to it."""
    lines = labelled()
    lines.add_row("target", _sought(trace, target))
    lines.add_row("", _emergence(trace, target))
    for name, parts in (
        ("head", trace.heads(target.position)),
        ("neuron", trace.neurons(target.position)),
    ):
        added = [part for part in parts if part.logit_contribution is not None]
        if added:
            best = max(added, key=lambda part: part.logit_contribution or 0.0)
            lines.add_row("", _sentence(trace, name, best))
    return lines


def _sought(trace: Trace, target: PositionTarget) -> Text:
    line = Text.assemble((str(target.target), "bold green"))
    line.append(f" after {at(target.position, trace.prompt_tokens)}: ")
    if target.target_rank == 0:
        line.append("the model's own prediction")
    else:
        line.append(f"rank {target.target_rank}; the model predicts {target.predicted}")
    return line.append(f", probability {probability_cell(target.target_probability)}")


def _emergence(trace: Trace, target: PositionTarget) -> str:
    residuals = [
        node
        for node in trace.node_list
        if node.position == target.position and node.kind in _STEPS and node.projection
    ]
    below = [i for i, node in enumerate(residuals) if _rank(node) != 0]
    if not residuals:
        return "no residual was traced"
    if below and below[-1] == len(residuals) - 1:
        best = min(residuals, key=_rank)
        return (
            f"best rank {_rank(best)} after {_step(trace, best)}; final rank {_rank(residuals[-1])}"
        )
    first = residuals[below[-1] + 1 if below else 0]
    return f"ranked first from {_step(trace, first)} onwards"


def _rank(node: Node) -> int:
    rank = node.projection.target_rank if node.projection else None
    return _UNRANKED if rank is None else rank


def _step(trace: Trace, node: Node) -> str:
    """`layer 3's attention`; a layer without a residual between its parts is named as a whole."""
    if node.layer is None:
        return "the embedding"
    mids = trace.nodes_of(NodeKind.RESIDUAL_MID, node.position)
    whole = node.kind is NodeKind.BLOCK_OUTPUT and node.layer not in {mid.layer for mid in mids}
    return f"layer {node.layer}'s {'attention and MLP' if whole else _STEPS[node.kind]}"


def _sentence(trace: Trace, name: str, part: Part) -> str:
    node = part.node
    number = node.head if name == "head" else node.neuron
    text = f"L{node.layer} {name} {number} adds most: {part.logit_contribution:+.2f} to its logit"
    sources = [memory for memory in trace.parts_of(node) if memory.node.source_position is not None]
    if sources:
        most = max(sources, key=lambda memory: (memory.edge and memory.edge.attention) or 0.0)
        attention = (most.edge and most.edge.attention) or 0.0
        text += f", reading {at(most.node.source_position or 0, trace.prompt_tokens)}"
        text += f" with attention {attention:.2f}"
    return text
