"""MLP neurons: how strongly each fires, and what its value row writes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from januslens._results.graph import Part
from januslens._results.nodes import Node
from januslens._results.tokens import Token
from januslens._results.words import written
from januslens.cli.show.cells import percent_cell, signed_cell, tokens_cell
from januslens.cli.show.console import section, table

_SHOWN = 5


def neurons_section(neurons: Sequence[Part], title: str, sought: Sequence[Token]) -> Group:
    """One row a neuron: contribution, share, activation and the tokens of its value row."""
    grid = table(">logit", ">share", "neuron", ">activation", "writes")
    for part in neurons:
        grid.add_row(
            signed_cell(part.logit_contribution),
            percent_cell(part.share),
            Text(_name(part.node)),
            signed_cell(part.node.activation),
            tokens_cell(written(part.node)[:_SHOWN], sought),
        )
    note = "share: of its MLP's result; where the activation is negative, the row's bottom tokens"
    return section(title, grid, note)


def _name(node: Node) -> str:
    expert = "" if node.expert is None else f" expert {node.expert}"
    return f"L{node.layer}{expert} neuron {node.neuron}"
