"""Compare two traces node by node and edge by edge."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from januslens.results import exports
from januslens.results.exports import PageFrame, notebook_html, page_html
from januslens.results.graph import Edge, Node
from januslens.results.kinds import NodeKind
from januslens.results.tokens import Token

if TYPE_CHECKING:
    import pandas as pd

    from januslens.results.trace import Trace


_ROWS = 10  # of the printed table


@dataclass(frozen=True, slots=True)
class NodeDifference:
    """The same node in two traces.

    Attributes:
        before: The node in the trace that is compared.
        after: The node in the other trace.
    """

    before: Node
    after: Node

    @property
    def top_before(self) -> Token | None:
        """The top token in the trace that is compared; None without a projection."""
        return _top(self.before)

    @property
    def top_after(self) -> Token | None:
        """The top token in the other trace; None without a projection."""
        return _top(self.after)

    @property
    def norm_ratio(self) -> float | None:
        """Norm in the other trace, divided by the norm in this one; None if that is zero."""
        return self.after.norm / self.before.norm if self.before.norm else None

    @property
    def probability_difference(self) -> float | None:
        """Difference of the target's probabilities, other trace minus this one."""
        before, after = self.before.projection, self.after.projection
        return _difference(
            before.target_probability if before else None,
            after.target_probability if after else None,
        )


@dataclass(frozen=True, slots=True)
class EdgeDifference:
    """The same edge in two traces; differences are other trace minus this one.

    Attributes:
        before: The edge in the trace that is compared.
        after: The edge in the other trace.
    """

    before: Edge
    after: Edge

    @property
    def contribution_difference(self) -> float | None:
        """Difference of the contributions to the target's logit; None if not requested."""
        return _difference(self.before.logit_contribution, self.after.logit_contribution)

    @property
    def share_difference(self) -> float | None:
        """Difference of the shares; None for edges that are not parts."""
        return _difference(self.before.share, self.after.share)


@dataclass(frozen=True, repr=False)
class TraceComparison:
    """Two traces, with the nodes and edges that both have.

    Ranks, probabilities and contributions refer to the target of each trace. Request both traces
    with the same target to compare them.

    Attributes:
        before: The trace that is compared.
        after: The other trace.
        node_list: The nodes of both traces, in the order of `before`. An OTHER node is only among
            them if it is the sum of the same parts in both.
        edge_list: The edges of both traces, in the order of `before`.
        only_before: Ids of the nodes that only `before` has.
        only_after: Ids of the nodes that only `after` has, in its own coordinates.
        positions: The position in `after` for each compared position of `before`; None = the same.
    """

    before: Trace = field(repr=False)
    after: Trace = field(repr=False)
    node_list: tuple[NodeDifference, ...]
    edge_list: tuple[EdgeDifference, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    positions: Mapping[int, int] | None = None

    @cached_property
    def nodes(self) -> pd.DataFrame:
        """A data frame with one row per node, indexed by the id in `before`. Requires pandas."""
        return exports.node_differences_frame(self.node_list)

    @cached_property
    def edges(self) -> pd.DataFrame:
        """A data frame with one row per edge. Requires pandas."""
        return exports.edge_differences_frame(self.edge_list)

    @property
    def different_parts(self) -> str:
        """Which models have different parts, in a sentence; empty if both have the same parts.

        Models have the same parts if they have the same architecture and equal numbers of layers
        and heads. Otherwise, nodes that have the same id are unrelated.
        """
        both = [_parts(trace) for trace in (self.before, self.after)]
        if both[0] == both[1]:
            return ""
        return (
            f"the models have different parts ({' and '.join(both)}); "
            "parts with the same name are not compared"
        )

    def changed_contributions(self) -> list[EdgeDifference]:
        """Return the edges whose contributions to the target's logit differ, most different first.

        Raises:
            ValueError: A trace was requested without logit contributions.
        """
        found = [edge for edge in self.edge_list if edge.contribution_difference is not None]
        if not found:
            raise ValueError(
                "the traces have no logit contributions; request them with logit_contribution=True"
            )
        return sorted(found, key=lambda edge: -abs(edge.contribution_difference or 0.0))

    def __str__(self) -> str:
        """The contributions that differ most, as a table; one line if there are none."""
        if self.different_parts:
            return f"{self!r}: {self.different_parts}"
        found = [edge for edge in self.edge_list if edge.contribution_difference is not None]
        if not found:
            return repr(self)
        explained = self.before.explained() if self.before.targets else "logit"
        lines = [
            f"Contributions to the {explained} that differ most",
            f"{'before':>9} {'after':>9} {'change':>9}  node",
        ]
        for edge in self.changed_contributions()[:_ROWS]:
            figures = (
                edge.before.logit_contribution,
                edge.after.logit_contribution,
                edge.contribution_difference,
            )
            numbers = " ".join(f"{figure or 0.0:+9.2f}" for figure in figures)
            lines.append(f"{numbers}  {edge.before.source}")
        alone = len(self.only_before), len(self.only_after)
        lines.append(f"{alone[0]} nodes only before, {alone[1]} only after")
        return "\n".join(lines)

    def __repr__(self) -> str:
        """A one-line description, because there may be thousands of nodes."""
        return (
            f"<TraceComparison: {len(self.node_list)} nodes and {len(self.edge_list)} edges of "
            f"both, {len(self.only_before)} nodes only before, {len(self.only_after)} only after>"
        )

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)

    def to_html(self) -> str:
        """Return the differences as a page: one HTML file that needs no network.

        The page shows the largest contributions of both traces with one scale, their differences,
        and the residual streams. It refers to the last traced position of each.
        """
        return page_html(self, None)

    def show(self, *, height: int = 800) -> PageFrame:
        """Show the page of `to_html` in a notebook; `height` is in pixels."""
        return PageFrame(self.to_html(), height)


def _parts(trace: Trace) -> str:
    sizes = trace.header.sizes
    return f"{trace.provenance.architecture} with {sizes.n_layers} layers of {sizes.n_heads} heads"


def compare_traces(
    before: Trace, after: Trace, positions: Mapping[int, int] | Literal["shared"] | None
) -> TraceComparison:
    """Align the nodes and edges of two traces; `Trace.compare` documents the arguments."""
    lengths = len(before.prompt_tokens), len(after.prompt_tokens)
    if positions == "shared":
        positions = _shared_positions(before.prompt_tokens, after.prompt_tokens)
    if positions is None and lengths[0] != lengths[1]:
        raise ValueError(
            f"the prompts have {lengths[0]} and {lengths[1]} tokens; give the positions to "
            "compare, as a mapping from positions of this trace to positions of the other, or "
            "'shared'"
        )
    aligned = _Positions(positions)
    nodes_after = {node.id: node for node in after.node_list}
    differing = _sums_of_other_parts(before, aligned, nodes_after)
    edges_after = {(edge.source, edge.target, edge.kind): edge for edge in after.edge_list}
    nodes, only_before, met = [], [], set()
    for node in before.node_list:
        other = aligned.node_id(node.id)
        if other in nodes_after and other not in differing:
            met.add(other)
            nodes.append(NodeDifference(node, nodes_after[other]))
        else:
            only_before.append(node.id)
    return TraceComparison(
        before=before,
        after=after,
        node_list=tuple(nodes),
        edge_list=tuple(_edges(before, aligned, edges_after, differing)),
        only_before=tuple(only_before),
        only_after=tuple(node_id for node_id in nodes_after if node_id not in met),
        positions=positions,
    )


def _shared_positions(before: Sequence[Token], after: Sequence[Token]) -> dict[int, int]:
    """Map the tokens at the start and at the end that both prompts have, and the last tokens."""
    texts = [token.text for token in before], [token.text for token in after]
    shorter = min(map(len, texts))
    start = min(shorter - 1, _equal(zip(*texts, strict=False)))
    same_end = _equal(zip(reversed(texts[0]), reversed(texts[1]), strict=False))
    end = max(1, min(shorter - start, same_end))
    from_end = {len(texts[0]) + place: len(texts[1]) + place for place in range(-end, 0)}
    return {position: position for position in range(start)} | from_end


def _equal(pairs: Iterable[tuple[str, str]]) -> int:
    """Count the equal pairs up to the first that differs."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _edges(
    before: Trace, aligned: _Positions, edges_after: Mapping[Any, Edge], differing: Set[str]
) -> Iterator[EdgeDifference]:
    for edge in before.edge_list:
        ends = aligned.node_id(edge.source), aligned.node_id(edge.target)
        if ends[0] in differing:
            continue
        if (found := edges_after.get((*ends, edge.kind))) is not None:
            yield EdgeDifference(edge, found)


def _sums_of_other_parts(
    before: Trace, aligned: _Positions, nodes_after: Mapping[str, Node]
) -> set[str]:
    """Return the ids in the other trace of the OTHER nodes that sum other parts there."""
    sums = ((aligned.node_id(node.id), node) for node in before.nodes_of(NodeKind.OTHER))
    return {
        other
        for other, node in sums
        if other is not None and other in nodes_after and nodes_after[other].members != node.members
    }


class _Positions:
    """Translates the positions in node ids to those of another prompt."""

    _COORDINATE = re.compile(r"(?<![^/])([ps])(\d+)(?![^/])")

    def __init__(self, positions: Mapping[int, int] | None) -> None:
        """`positions` maps positions to those of the other prompt; None = they are the same."""
        self._positions = positions

    def node_id(self, node_id: str) -> str | None:
        """Return the id in the other trace; None if it names a position that is not mapped."""
        if self._positions is None:
            return node_id
        named = {int(number) for _letter, number in self._COORDINATE.findall(node_id)}
        if not named <= set(self._positions):
            return None
        mapped = self._positions
        return self._COORDINATE.sub(lambda found: f"{found[1]}{mapped[int(found[2])]}", node_id)


def _top(node: Node) -> Token | None:
    return node.projection.top[0].token if node.projection and node.projection.top else None


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before
