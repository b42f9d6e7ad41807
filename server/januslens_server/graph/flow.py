"""Collecting the nodes and edges of one layer at one position."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from januslens_server.graph.weights import Finish
from januslens_server.results import Edge, EdgeKind, Node, NodeKind


@dataclass(frozen=True)
class Flow:
    """Nodes with their vectors `[n, d_model]` and activations `[n]` (NaN: none), and edges.

    `projected` says which nodes are read through the lens.
    """

    nodes: list[Node]
    vectors: torch.Tensor
    activations: torch.Tensor
    projected: list[bool]
    edges: list[Edge]


class FlowBuilder:
    """Gathers nodes and edges at one `layer` and `position`.

    `direction` `[d_model]`, if given, is what a part is multiplied with for its
    `logit_contribution` (`lens.head.LensHead.attribution`).
    """

    def __init__(self, layer: int, position: int, direction: torch.Tensor | None) -> None:
        self.layer = layer
        self.position = position
        self.direction = direction
        self._nodes: list[Node] = []
        self._vectors: list[torch.Tensor] = []
        self._activations: list[torch.Tensor] = []
        self._projected: list[bool] = []
        self._ends: list[tuple[str, str, EdgeKind]] = []
        self._values: list[torch.Tensor] = []

    def before(self, finish: Finish, raw: torch.Tensor) -> FlowBuilder:
        """This same flow for the parts of `raw` `[d_model]`, which reach the residual by `finish`.

        What is added here is added there; only logit contributions take the longer way.
        """
        inside = copy.copy(self)
        if self.direction is not None:
            inside.direction = finish.pull_back(self.direction, raw)
        return inside

    def node(self, kind: NodeKind, vector: torch.Tensor, *, projected: bool = True) -> str:
        """Add the layer's one node of this kind at this position; gives its id."""
        return self.nodes([Node(kind, self.position, self.layer)], vector[None], projected)[0]

    def nodes(
        self,
        nodes: Sequence[Node],
        vectors: torch.Tensor,
        projected: bool = True,
        activations: torch.Tensor | None = None,
    ) -> list[str]:
        """Add nodes with their vectors `[n, d_model]` and activations `[n]`; gives their ids."""
        self._nodes += nodes
        self._vectors.append(vectors)
        self._projected += [projected] * len(nodes)
        self._activations.append(_none(len(nodes), vectors) if activations is None else activations)
        return [node.id for node in nodes]

    def other(self, total: Node, vector: torch.Tensor) -> str:
        """Add the OTHER node of the sum `total`: what a selection left out of it."""
        node = replace(total, kind=NodeKind.OTHER, sum_kind=total.kind)
        return self.nodes([node], vector[None])[0]

    def edges(
        self,
        kind: EdgeKind,
        sources: Sequence[str],
        targets: Sequence[str],
        weights: torch.Tensor,
        attention: torch.Tensor | None = None,
    ) -> None:
        """Add edges that are no parts of a sum; `weights` and `attention` are `[n]`."""
        none = _none(len(sources), weights)
        self._add(kind, sources, targets, weights, none, attention, none)

    def parts(
        self,
        sources: Sequence[str],
        target: str | Sequence[str],
        parts: torch.Tensor,
        total: torch.Tensor,
        attention: torch.Tensor | None = None,
    ) -> None:
        """Add the terms `parts` `[n, d_model]` of the sum `total` `[d_model]` or `[n, d_model]`.

        share = <part, total> / ||total||^2, signed; none where the sum is zero.
        """
        total = total.expand_as(parts)
        size = total.square().sum(-1)
        shares = torch.where(size > 0, (parts * total).sum(-1) / size, torch.nan)
        direction = self.direction
        contributions = _none(len(sources), parts) if direction is None else parts @ direction
        targets = [target] * len(sources) if isinstance(target, str) else target
        self._add(
            EdgeKind.PART, sources, targets, parts.norm(dim=-1), shares, attention, contributions
        )

    def _add(
        self,
        kind: EdgeKind,
        sources: Sequence[str],
        targets: Sequence[str],
        weights: torch.Tensor,
        shares: torch.Tensor,
        attention: torch.Tensor | None,
        contributions: torch.Tensor,
    ) -> None:
        self._ends += [(s, t, kind) for s, t in zip(sources, targets, strict=True)]
        attended = _none(len(sources), weights) if attention is None else attention
        self._values.append(torch.stack([weights, shares, attended, contributions], dim=1))

    def build(self) -> Flow:
        """Everything gathered so far; edge values cross from the device once."""
        values = torch.cat(self._values).tolist()
        edges = [
            Edge(source, target, kind, weight, *(_present(v) for v in optional))
            for (source, target, kind), (weight, *optional) in zip(self._ends, values, strict=True)
        ]
        return Flow(
            nodes=self._nodes,
            vectors=torch.cat(self._vectors),
            activations=torch.cat(self._activations),
            projected=self._projected,
            edges=edges,
        )


def _none(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((count,), torch.nan, device=like.device)


def _present(value: float) -> float | None:
    return None if value != value else value  # noqa: PLR0124 - NaN stands for "has none"
