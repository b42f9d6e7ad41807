"""The strongest way from the prediction back to the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Group
from rich.text import Text

from januslens._results.graph import Part
from januslens._results.kinds import NodeKind
from januslens._results.tokens import Token
from januslens._results.trace import Trace
from januslens._results.words import in_words
from januslens.cli.show.cells import percent_cell, signed_cell, tokens_cell
from januslens.cli.show.console import section, table

_SHOWN = 3
_RESIDUALS = {NodeKind.RESIDUAL_MID, NodeKind.BLOCK_OUTPUT}
_UNREAD = {NodeKind.ATTENTION_CONCAT, NodeKind.FINAL_NORM}


def path_section(trace: Trace, path: Sequence[Part], sought: Sequence[Token]) -> Group:
    """One row a step back: what the row above is mostly made of, and what that says.

    Residuals in a row are one step: nothing but the stream itself carried the token there.
    """
    grid = table("", "made of", ">share", ">logit", "says")
    read_steps = [part for part in path if part.node.kind not in _UNREAD]
    for in_stream, steps in groupby(read_steps, lambda part: part.node.kind in _RESIDUALS):
        for step in _shown(list(steps), in_stream):
            grid.add_row(*_row(trace, *step, sought))
    return section(
        "The strongest way back",
        grid,
        "share and logit: of the step's last part in the sum above it",
    )


Step = tuple[str | None, Part]


def _shown(parts: list[Part], in_stream: bool) -> list[Step]:
    if not in_stream or len(parts) == 1:
        return [(None, part) for part in parts]
    last, first = parts[0].node.layer, parts[-1].node.layer
    name = (
        f"L{last}'s residual stream" if last == first else f"residual stream, L{last} to L{first}"
    )
    return [(name, parts[-1])]


def _row(trace: Trace, name: str | None, part: Part, sought: Sequence[Token]) -> list[Text]:
    read = part.node.projection
    return [
        Text("" if part.node.kind is NodeKind.PREDICTION else "←"),
        Text(name or in_words(part.node, trace.prompt_tokens)),
        percent_cell(part.share),
        signed_cell(part.logit_contribution),
        tokens_cell(read.top_tokens[:_SHOWN], sought) if read else Text(""),
    ]
