"""How a token emerges over the layers: the residual stream, read after every step."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from januslens._results.graph import Part
from januslens._results.nodes import Node
from januslens._results.residuals import residual_steps
from januslens._results.tokens import Token
from januslens._results.trace import Trace
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
        for i, step in enumerate(residual_steps(trace, layer, position)):
            label = f"{layer.layer}" if i == 0 else ""
            grid.add_row(label, step.name, *_reading(step.node, step.added, [target]))
    return section(
        f"How {target} emerges in the residual stream",
        grid,
        f"rank and probability of {target}, rank 0 being the top; logit: what the step adds to "
        "its logit directly",
    )


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
