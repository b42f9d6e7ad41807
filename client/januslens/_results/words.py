"""Nodes of the flow graph in words."""

from __future__ import annotations

from collections.abc import Sequence

from januslens._results.kinds import NodeKind
from januslens._results.nodes import Node
from januslens._results.tokens import Token

_NAMES = {
    NodeKind.BLOCK_INPUT: "embedding",
    NodeKind.ATTENTION_INPUT: "attention's input",
    NodeKind.QUERY: "query",
    NodeKind.KEY: "key",
    NodeKind.VALUE: "value",
    NodeKind.HEAD_QUERY: "query",
    NodeKind.HEAD_KEY: "key",
    NodeKind.HEAD_VALUE: "value",
    NodeKind.MEMORY_KEY: "key",
    NodeKind.MEMORY_VALUE: "value",
    NodeKind.HEAD_OUTPUT: "output",
    NodeKind.ATTENTION_CONCAT: "all heads together",
    NodeKind.ATTENTION_NEURON: "row of W_O",
    NodeKind.ATTENTION_BIAS: "attention's bias",
    NodeKind.ATTENTION_SUM: "attention's raw result",
    NodeKind.ATTENTION_OUTPUT: "attention's result",
    NodeKind.RESIDUAL_MID: "residual after attention",
    NodeKind.MLP_INPUT: "MLP's input",
    NodeKind.MLP_KEY: "key",
    NodeKind.MLP_UP: "up column",
    NodeKind.MLP_VALUE: "value",
    NodeKind.MLP_BIAS: "MLP's bias",
    NodeKind.MLP_SUM: "MLP's raw result",
    NodeKind.MLP_OUTPUT: "MLP's result",
    NodeKind.BLOCK_OUTPUT: "residual after the block",
    NodeKind.FINAL_NORM: "after the final norm",
    NodeKind.PREDICTION: "prediction",
    NodeKind.OTHER: "all the rest",
}


def in_words(node: Node, prompt: Sequence[Token]) -> str:
    """`L2 head 3 value of ␣Japan`, its position left out: it is the one under study."""
    words = [] if node.layer is None else [f"L{node.layer}"]
    if node.head is not None:
        words.append(f"head {node.head}")
    if node.expert is not None:
        words.append(f"expert {node.expert}")
    if node.neuron is not None:
        words.append(f"neuron {node.neuron}")
    words.append(_NAMES.get(node.kind, str(node.kind).lower()))
    source = node.position if node.kind is NodeKind.BLOCK_INPUT else node.source_position
    if source is not None:
        words.append(f"of {at(source, prompt)}")
    return " ".join(words)


def at(position: int, prompt: Sequence[Token]) -> str:
    """The prompt's token at a position, and the position."""
    return f"{prompt[position]} ({position})" if position < len(prompt) else f"({position})"


def written(node: Node) -> tuple[Token, ...]:
    """What a node adds: its top tokens, or with a negative activation its bottom ones."""
    if node.projection is None:
        return ()
    negative = (node.activation or 0.0) < 0
    return node.projection.bottom_tokens if negative else node.projection.top_tokens
