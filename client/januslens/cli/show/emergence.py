"""How a token emerges over the layers: the residual stream, read after every step."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from januslens._results.graph import Part
from januslens._results.kinds import NodeKind
from januslens._results.nodes import Node
from januslens._results.tokens import Token
from januslens._results.trace import Trace
from januslens._results.trace_events import LayerGraph
from januslens.cli.show.cells import probability_cell, rank_cell, signed_cell, tokens_cell
from januslens.cli.show.console import section, table

_BAR = 10
_BLOCKS = " ▏▎▍▌▋▊▉█"
_SHOWN = 3


def emergence(trace: Trace, position: int) -> Group:
    """One row a residual: its top tokens, the target's rank and probability, what was added."""
    target = trace.target(position).target
    grid = table(">layer", "residual", "top tokens", ">rank", "probability", ">logit")
    for layer in trace.layers:
        for i, (name, node, added) in enumerate(_residuals(trace, layer, position)):
            label = f"{layer.layer}" if i == 0 else ""
            grid.add_row(label, name, *_reading(node, added, [target]))
    return section(
        f"How {target} emerges in the residual stream",
        grid,
        f"rank and probability of {target}, rank 0 being the top; logit: what the step adds to "
        "its logit directly",
    )


Residual = tuple[str, Node, Part | None]


def _residuals(trace: Trace, layer: LayerGraph, position: int) -> list[Residual]:
    """The block's input where it was not the row before, then after attention, after the MLP."""
    mids = layer.nodes_of(NodeKind.RESIDUAL_MID, position)
    outputs = layer.nodes_of(NodeKind.BLOCK_OUTPUT, position)
    own = [node for node in outputs if node.layer == layer.layer]
    inputs = layer.nodes_of(NodeKind.BLOCK_INPUT, position)
    gaps = [node for node in outputs if node.layer != layer.layer]
    name = "+ MLP" if mids else "+ attention and MLP"
    return [
        *(("input", node, None) for node in inputs + gaps),
        *(("+ attention", node, _part(trace, node, NodeKind.ATTENTION_OUTPUT)) for node in mids),
        *((name, node, _part(trace, node, NodeKind.MLP_OUTPUT)) for node in own),
    ]


def _part(trace: Trace, node: Node, kind: NodeKind) -> Part | None:
    return next((part for part in trace.parts_of(node) if part.node.kind is kind), None)


def _reading(node: Node, added: Part | None, sought: Sequence[Token]) -> list[Text]:
    read = node.projection
    return [
        tokens_cell(read.top_tokens[:_SHOWN], sought) if read else Text(""),
        rank_cell(read.target_rank if read else None),
        _probability_bar(read.target_probability if read else None),
        signed_cell(added.logit_contribution if added else None),
    ]


def _probability_bar(probability: float | None) -> Text:
    if probability is None:
        return Text("")
    eighths = round(probability * _BAR * 8)
    bar = "█" * (eighths // 8) + _BLOCKS[eighths % 8].strip()
    return Text.assemble(probability_cell(probability), " ", (bar, "green"))
