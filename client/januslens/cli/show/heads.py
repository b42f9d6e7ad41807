"""Attention heads: what each reads where, and what it brings."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from januslens._results.graph import Part
from januslens._results.kinds import NodeKind
from januslens._results.tokens import Token
from januslens._results.trace import Trace
from januslens._results.words import at
from januslens.cli.show.cells import percent_cell, signed_cell, tokens_cell
from januslens.cli.show.console import section, table

_SOURCES = 2
_SHOWN = 4


def heads_section(
    trace: Trace, heads: Sequence[Part], title: str, sought: Sequence[Token]
) -> Group:
    """One row a head: contribution, share, sources with their attention, and its top tokens."""
    grid = table(">logit", ">share", "head", "reads", "brings")
    for part in heads:
        read = part.node.projection
        grid.add_row(
            signed_cell(part.logit_contribution),
            percent_cell(part.share),
            Text(f"L{part.node.layer} head {part.node.head}"),
            _sources(trace, part),
            tokens_cell(read.top_tokens[:_SHOWN], sought) if read else Text(""),
        )
    note = "share: of all heads of its layer; reads: source token (position) and attention"
    return section(title, grid, note)


def _sources(trace: Trace, head: Part) -> Text:
    """Where the head looked, most attended first."""
    memories = [
        part for part in trace.parts_of(head.node) if part.node.kind is NodeKind.MEMORY_VALUE
    ]
    memories.sort(key=lambda part: -_attention(part))
    cell = Text(no_wrap=True, overflow="ellipsis")
    for part in memories[:_SOURCES]:
        cell.append(f"{at(part.node.source_position or 0, trace.prompt_tokens)} ")
        cell.append(f"{_attention(part):.2f}  ", "dim")
    cell.rstrip()
    return cell


def _attention(part: Part) -> float:
    return (part.edge.attention if part.edge else None) or 0.0
