"""The contribution tree: the parts of a forward pass that add up to the logit of a target."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from januslens.results.kinds import NodeKind

if TYPE_CHECKING:
    from januslens.results.graph import GraphView, Node, Part


@dataclass(frozen=True, slots=True)
class ContributionTree:
    """What a node adds to the target's logit directly, and the parts of that contribution.

    `contribution` is the sum of `rest` and of the contributions of `parts`.

    Attributes:
        node: The node; at the root of a tree, the residual stream that the logit is read from.
        contribution: What the node adds to the target's logit; at the root the logit itself, before
            any soft-cap.
        attention: The attention probability of a source position; None for other nodes.
        parts: The listed parts, the largest contribution first. The parts of the residual stream
            are the embedding and the results of attention and MLP in all layers; those of
            attention are its heads and bias; those of a head its source positions; those of an MLP
            its neurons and bias.
        rest: The contribution of all parts that are not listed; at the root also the constant.
    """

    node: Node
    contribution: float
    attention: float | None
    parts: tuple[ContributionTree, ...]
    rest: float

    def lines(self, depth: int = 0) -> Iterator[tuple[int, ContributionTree]]:
        """Return this node and all nodes below it with their depths, parents first."""
        yield depth, self
        for part in self.parts:
            yield from part.lines(depth + 1)

    def find(self, node_id: str) -> ContributionTree:
        """Return the listed part with this id, at any depth.

        Raises:
            KeyError: No listed part has this id.
        """
        for _, part in self.lines():
            if part.node.id == node_id:
                return part
        raise KeyError(node_id)


def contribution_tree(
    graph: GraphView, residual: Node, constant: float, at_most: int
) -> ContributionTree | None:
    """Return the contribution tree of a node of the residual stream.

    Nodes are listed in the order of their absolute contributions, each with the nodes that it is a
    part of, until there are `at_most` below the root. `constant` is the contribution of the biases
    of final norm and head.

    Returns None if the parts of `residual` have no contributions.
    """
    own = [part.logit_contribution for part in graph.parts_of(residual)]
    known = [value for value in own if value is not None and math.isfinite(value)]
    if not known or len(known) < len(own):
        return None
    summands = _summands(graph, residual)
    whole = _tree(graph, residual, math.fsum([*known, constant]), None, summands)
    listed: set[str] = {residual.id}
    for path in sorted(_paths(whole), key=lambda path: -abs(path[-1].contribution)):
        added = listed.union(part.node.id for part in path)
        if len(added) > at_most + 1:
            break
        listed = added
    return _listed(whole, listed)


def _paths(tree: ContributionTree) -> Iterator[tuple[ContributionTree, ...]]:
    """Return the way from the root to each node below it."""
    for part in tree.parts:
        yield (part,)
        yield from ((part, *path) for path in _paths(part))


def _tree(
    graph: GraphView,
    node: Node,
    contribution: float,
    attention: float | None,
    parts: Iterable[Part],
) -> ContributionTree:
    """Return a node with all of its parts that have contributions."""
    branches = [
        _tree(graph, part.node, part.logit_contribution, part.attention, _parts(graph, part.node))
        for part in parts
        if part.logit_contribution is not None and math.isfinite(part.logit_contribution)
    ]
    branches.sort(key=lambda branch: -branch.contribution)
    return _with_rest(ContributionTree(node, contribution, attention, tuple(branches), 0.0))


def _listed(whole: ContributionTree, ids: Set[str]) -> ContributionTree:
    """Return a tree with only these nodes."""
    kept = tuple(_listed(part, ids) for part in whole.parts if part.node.id in ids)
    return _with_rest(replace(whole, parts=kept))


def _with_rest(tree: ContributionTree) -> ContributionTree:
    listed = math.fsum(part.contribution for part in tree.parts)
    return replace(tree, rest=tree.contribution - listed)


_RESIDUALS = {NodeKind.RESIDUAL_MID, NodeKind.BLOCK_OUTPUT}


def _summands(graph: GraphView, residual: Node) -> Iterator[Part]:
    """Return the parts of the residual stream; residuals with parts of their own are divided."""
    for part in graph.parts_of(residual):
        if part.node.kind in _RESIDUALS and graph.parts_of(part.node):
            yield from _summands(graph, part.node)
        else:
            yield part


# The nodes whose parts are the parts of a sublayer's result.
_SUMS = {
    NodeKind.ATTENTION_OUTPUT: (NodeKind.ATTENTION_SUM, NodeKind.ATTENTION_CONCAT),
    NodeKind.MLP_OUTPUT: (NodeKind.MLP_SUM,),
}
# OTHER is part of the rest. So are the rows of W_O, which divide the same sum as the heads.
_LISTED = {
    NodeKind.HEAD_OUTPUT,
    NodeKind.MIXER_HEAD,
    NodeKind.ATTENTION_BIAS,
    NodeKind.MEMORY_VALUE,
    NodeKind.MLP_VALUE,
    NodeKind.MLP_BIAS,
}


def _parts(graph: GraphView, node: Node) -> list[Part]:
    """Return the parts of a sublayer's result or of a head that a tree lists."""
    place = f"L{node.layer}/p{node.position}/"
    sums = [node.id, *(place + kind for kind in _SUMS.get(node.kind, ()))]
    return [part for total in sums for part in graph.parts_of(total) if part.node.kind in _LISTED]
