"""The residual stream at one position, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from januslens._results.graph import GraphView, Part
from januslens._results.kinds import NodeKind
from januslens._results.nodes import Node

if TYPE_CHECKING:
    from januslens._results.trace_events import LayerGraph


@dataclass(frozen=True, slots=True)
class ResidualStep:
    """The residual after something was added to it.

    Attributes:
        name: What was added, or `input` for a residual that no traced block made.
        node: The residual.
        added: The part that was added last, with its edge.
    """

    name: str
    node: Node
    added: Part | None


def residual_steps(graph: GraphView, layer: LayerGraph, position: int) -> Iterator[ResidualStep]:
    """The block's input where it was not the step before, then after attention, after the MLP."""
    mids = layer.nodes_of(NodeKind.RESIDUAL_MID, position)
    outputs = layer.nodes_of(NodeKind.BLOCK_OUTPUT, position)
    inputs = layer.nodes_of(NodeKind.BLOCK_INPUT, position)
    gaps = [node for node in outputs if node.layer != layer.layer]
    for node in inputs + gaps:
        yield ResidualStep("input", node, None)
    for node in mids:
        added = _part(graph, node, NodeKind.ATTENTION_OUTPUT)
        yield ResidualStep("+ attention", node, added)
    for node in outputs:
        if node.layer == layer.layer:
            name = "+ MLP" if mids else "+ attention and MLP"
            yield ResidualStep(name, node, _part(graph, node, NodeKind.MLP_OUTPUT))


def _part(graph: GraphView, node: Node, kind: NodeKind) -> Part | None:
    return next((part for part in graph.parts_of(node) if part.node.kind is kind), None)
