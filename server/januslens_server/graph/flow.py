"""The nodes and edges of a flow graph, and the builder that collects them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch

from januslens_server.errors import NotFinite
from januslens_server.graph.weights import Finish, WeightedRows
from januslens_server.results import (
    EdgeKind,
    Edges,
    Flags,
    Floats,
    Ints,
    Members,
    NodeColumn,
    NodeKind,
    NodeRun,
    Nodes,
    coordinates,
)
from januslens_server.specs import Criterion
from januslens_server.transfer import HostCopy, to_device


class Scalars:
    """Columns of float32 numbers that are filled in pieces. Numbers that were not added are NaN.

    `send` ends the filling; all numbers then cross from the device in one copy.
    """

    def __init__(self) -> None:
        self._pieces: list[torch.Tensor] = []
        self._places: list[tuple[str, int]] = []
        self._copy: HostCopy | None = None

    def add(self, column: str, first: int, values: torch.Tensor) -> None:
        """Set the rows `first` to `first + n` of a column to `values` `[n]`."""
        self._pieces.append(values)
        self._places.append((column, first))

    def send(self) -> Scalars:
        """Start the copy of all numbers to the host."""
        if self._pieces:
            self._copy = HostCopy(torch.cat(self._pieces))
        return self

    def columns(self, lengths: dict[str, int]) -> dict[str, Floats]:
        """Wait for the numbers, and return the columns by name with these lengths.

        Raises `NotFinite` if a number other than a norm is infinite.
        """
        found = {name: np.full(n, np.nan, dtype=np.float32) for name, n in lengths.items()}
        if self._copy is not None:
            (copied,) = self._copy.tensors()
            flat = copied.numpy()
            start = 0
            for (name, first), piece in zip(self._places, self._pieces, strict=True):
                found[name][first : first + len(piece)] = flat[start : start + len(piece)]
                start += len(piece)
        if any(np.isinf(column).any() for name, column in found.items() if name != "norm"):
            raise NotFinite("activations are too large: float32 overflows", "use another prompt")
        return found


_EDGE_COLUMNS = ("weight", "share", "attention", "logit_contribution", "attribution")

# Kinds whose gradient is reported: the residual stream, and what sublayers add to it.
STATES = frozenset(
    {
        NodeKind.BLOCK_INPUT,
        NodeKind.ATTENTION_SUM,
        NodeKind.ATTENTION_OUTPUT,
        NodeKind.RESIDUAL_MID,
        NodeKind.MLP_SUM,
        NodeKind.MLP_OUTPUT,
        NodeKind.MIXER_OUTPUT,
        NodeKind.BLOCK_OUTPUT,
    }
)


class Numbers(NamedTuple):
    """The numbers of a flow: norms and activations `[n]` of its nodes (NaN = none), and its edges.

    A node's norm may be infinite if its vector is large.
    """

    norms: Floats
    activations: Floats
    edges: Edges


@dataclass(frozen=True)
class Flow:
    """Nodes with their vectors `[n, d_model]`, and a function that returns the flow's numbers.

    The numbers may still be on their way from the device: `numbers` waits for them. `vectors` has
    no rows if the builder does not keep vectors. `projected` says for each node whether it is
    projected. `gradients` `[m, d_model]` are those of the m nodes with the indices `states`.
    """

    nodes: Nodes
    vectors: torch.Tensor
    projected: Flags
    states: list[int]
    gradients: torch.Tensor
    numbers: Callable[[], Numbers]


class FlowBuilder:
    """Collects nodes and edges of one `layer` at n ascending `positions`.

    Methods for states of the residual stream add one node at each position; `at` returns a builder
    for the parts of one position. The flow is in the order of the positions.

    The dot product of a part with the row of `directions` `[n, d_model]` for its position is its
    `logit_contribution` (`lens.head.LensHead.attribution`); without directions, there are none. Its
    dot product with `gradients` `[n, d_model]` is its `attribution`; `toward` sets the gradients of
    a sum. Only nodes of the kinds in `shown` (empty: all kinds) and edges between them are kept.
    Callers use `shows` to skip the computation of others. Without `keeps_vectors`, only the norms
    of vectors are kept; without `attributes`, gradients are those of states only.
    """

    def __init__(
        self,
        layer: int,
        positions: Sequence[int],
        directions: torch.Tensor | None,
        shown: Collection[NodeKind] = (),
        keeps_vectors: bool = True,
        attributes: bool = False,
    ) -> None:
        self.layer = layer
        self.positions = positions
        self.directions = directions
        self.gradients: torch.Tensor | None = None
        self._shown = frozenset(shown)
        self._hidden: set[str] = set()
        self._runs: list[NodeRun] = []
        self._ids: list[str] = []
        self.keeps_vectors = keeps_vectors
        self._attributes = attributes
        self._vectors: list[torch.Tensor] = []
        self._projected: list[bool] = []
        self._states: list[int] = []
        self._state_gradients: list[torch.Tensor] = []
        self._edge_positions: list[int] = []
        self._sources: list[str] = []
        self._targets: list[str] = []
        self._kinds: list[int] = []
        self._scalars = Scalars()

    def shows(self, *kinds: NodeKind) -> bool:
        """Whether nodes of at least one of these kinds are kept."""
        return not self._shown or not self._shown.isdisjoint(kinds)

    def refer(self, run: NodeRun) -> list[str]:
        """Return the ids of nodes for use in edges; the nodes may belong to another flow."""
        if not self.shows(run.kind):
            self._hidden.update(run.ids)
        return run.ids

    @property
    def position(self) -> int:
        """The position of a builder for one position."""
        (position,) = self.positions
        return position

    def at(self, index: int) -> FlowBuilder:
        """Return a builder for the position with this index, which adds to the same flow."""
        row = slice(index, index + 1)
        inside = copy.copy(self)
        inside.positions = self.positions[row]
        inside.directions = None if self.directions is None else self.directions[row]
        inside.gradients = None if self.gradients is None else self.gradients[row]
        return inside

    def toward(self, gradients: torch.Tensor | None) -> FlowBuilder:
        """Return a builder for a sum with gradients `[n, d_model]`, which adds to the same flow.

        Attributions of the sum's parts are dot products with its gradient. States get it as their
        own gradient.
        """
        inside = copy.copy(self)
        inside.gradients = gradients
        return inside

    def effect(self, by: Criterion) -> torch.Tensor | None:
        """Return the vector `[d_model]` whose products with parts of a position are their scores.

        None means that parts are selected by VISIT's own scores.
        """
        if by is Criterion.VISIT:
            return None
        vectors = self.directions if by is Criterion.CONTRIBUTION else self.gradients
        return None if vectors is None else vectors[0]

    def before(self, finish: Finish, raw: torch.Tensor) -> FlowBuilder:
        """Return a builder for the parts of `raw` `[n, d_model]`, results before `finish`.

        It adds to the same flow, but its logit contributions include `finish`.
        """
        if self.directions is None:
            return self
        inside = copy.copy(self)
        inside.directions = finish.pull_back(self.directions, raw)
        return inside

    def node(self, kind: NodeKind, vector: torch.Tensor, *, projected: bool = True) -> str:
        """Add a node of a kind that occurs once at one position; return its id."""
        return self.states(kind, vector[None], projected=projected)[0]

    def states(self, kind: NodeKind, vectors: torch.Tensor, *, projected: bool = True) -> list[str]:
        """Add a node of this kind with its vector `[n, d_model]` at each position; return ids."""
        run = NodeRun(kind, self.positions, self.layer)
        return self.nodes([run], vectors, projected) if self.shows(kind) else self.refer(run)

    def nodes(
        self,
        runs: Sequence[NodeRun],
        vectors: torch.Tensor | None,
        projected: bool = True,
        activations: torch.Tensor | None = None,
        norms: torch.Tensor | None = None,
    ) -> list[str]:
        """Add nodes with their vectors `[n, d_model]` and activations `[n]`; return their ids.

        `norms` `[n]` are the norms of the vectors, if they are known. Then `vectors` may be None,
        unless the flow keeps vectors.
        """
        ids = [node_id for run in runs for node_id in run.ids]
        shown = [run for run in runs if self.shows(run.kind)]
        if len(shown) < len(runs):
            flags = [self.shows(run.kind) for run in runs for _ in run.ids]
            kept = [i for i, flag in enumerate(flags) if flag]
            self._hidden.update(ids[i] for i, flag in enumerate(flags) if not flag)
            vectors = None if vectors is None else vectors[kept]
            activations = None if activations is None else activations[kept]
            norms = None if norms is None else norms[kept]
        if not shown:
            return ids
        if self.gradients is not None:
            kinds = (run.kind for run in shown for _ in run.ids)
            states = [i for i, kind in enumerate(kinds) if kind in STATES]
            self._states += [len(self._ids) + i for i in states]
            self._state_gradients += [self.gradients[i % len(self.gradients)] for i in states]
        if activations is not None:
            self._scalars.add("activation", len(self._ids), activations)
        if norms is None:
            if vectors is None:
                raise ValueError("nodes have neither vectors nor norms; expected one of them")
            norms = vectors.norm(dim=-1)
        self._scalars.add("norm", len(self._ids), norms)
        self._runs += shown
        for run in shown:
            self._ids += run.ids
            self._projected += [projected] * len(run.ids)
        if vectors is not None and self.keeps_vectors:
            self._vectors.append(vectors)
        return ids

    def others(
        self,
        totals: NodeRun,
        vectors: torch.Tensor,
        members: Sequence[Members] | None = None,
    ) -> list[str]:
        """Add the OTHER nodes of `totals`; `vectors` `[n, d_model]` are sums of `members`.

        `members` is None if they are unknown, or if only an intervention added to the sum.
        """
        others = replace(totals, kind=NodeKind.OTHER, sum_kind=totals.kind, members=members)
        return self.nodes([others], vectors)

    def edges(
        self,
        kind: EdgeKind,
        sources: Sequence[str],
        targets: Sequence[str],
        weights: torch.Tensor,
        attention: torch.Tensor | None = None,
    ) -> None:
        """Add edges of one kind; `weights` and `attention` are `[n]`."""
        kept = self._between_shown(sources, targets)
        if not kept:
            return
        if len(kept) < len(sources):
            sources, targets = [sources[i] for i in kept], [targets[i] for i in kept]
            weights = weights[kept]
            attention = None if attention is None else attention[kept]
        self._scalars.add("weight", len(self._sources), weights)
        if attention is not None:
            self._scalars.add("attention", len(self._sources), attention)
        self._edge_positions += [*self.positions] * (len(sources) // len(self.positions))
        self._sources += sources
        self._targets += targets
        self._kinds += [int(kind)] * len(sources)

    def sums(
        self,
        terms: Sequence[tuple[Sequence[str], torch.Tensor]],
        targets: Sequence[str],
        totals: torch.Tensor,
    ) -> None:
        """Add PART edges from the terms of a sum at each position, as `parts` does.

        Each term has ids and vectors `[n, d_model]`, as the sums `targets` with vectors `totals`.
        """
        kept = [term for term in terms if self._between_shown(term[0], targets)]
        if not kept:
            return
        parts = torch.stack([vectors for _, vectors in kept])  # [terms, n, d_model]

        def products(vectors: torch.Tensor) -> torch.Tensor:
            return torch.stack([parts[:, i] @ each for i, each in enumerate(vectors)], 1).flatten()

        self._add_shares((parts * totals).sum(-1), totals)
        self._add_effects(products)
        sources = [node_id for ids, _ in kept for node_id in ids]
        norms = parts.norm(dim=-1).flatten()
        self.edges(EdgeKind.PART, sources, [*targets] * len(kept), norms)

    def parts(
        self,
        sources: Sequence[str],
        target: str | Sequence[str],
        parts: torch.Tensor,
        total: torch.Tensor,
        attention: torch.Tensor | None = None,
    ) -> None:
        """Add PART edges from terms to their sum.

        `parts` are `[n, d_model]`; `total` is `[d_model]`, or `[n, d_model]` if the sums differ.
        The share is `<part, total> / ||total||^2`; terms of a sum that is zero have no share.
        """
        targets = [target] * len(sources) if isinstance(target, str) else target
        kept = self._between_shown(sources, targets)
        if not kept:
            return
        if len(kept) < len(sources):
            sources, targets = [sources[i] for i in kept], [targets[i] for i in kept]
            parts, total = parts[kept], total if total.dim() == 1 else total[kept]
            attention = None if attention is None else attention[kept]
        self._add_shares((parts * total).sum(-1), total)
        self._add_effects(lambda vectors: parts @ vectors[0])
        self.edges(EdgeKind.PART, sources, targets, parts.norm(dim=-1), attention)

    def weighted_parts(
        self,
        sources: Sequence[str],
        target: str,
        terms: WeightedRows,
        picked: torch.Tensor,
        total: torch.Tensor,
    ) -> None:
        """Add the terms `activations[i] * rows[i]` of the sum `total` `[d_model]`, as `parts` does.

        `picked` `[n]` has the indices of the terms. The terms themselves are not computed.
        """
        if not self._between_shown(sources[:1], [target]):
            return
        activations = terms.activations[picked]
        every = len(picked) == len(terms.rows)  # then the rows need not be copied

        def products(vector: torch.Tensor) -> torch.Tensor:
            rows = (terms.rows @ vector)[picked] if every else terms.rows[picked] @ vector
            return activations * rows

        self._add_shares(products(total), total)
        self._add_effects(lambda vectors: products(vectors[0]))
        targets, norms = [target] * len(sources), activations.abs() * terms.norms[picked]
        self.edges(EdgeKind.PART, sources, targets, norms)

    def _add_shares(self, products: torch.Tensor, total: torch.Tensor) -> None:
        """Set the shares of the next edges, given the dot products of parts and total."""
        size = total.square().sum(-1)
        shares = torch.where(size > 0, products / size, torch.nan)
        self._scalars.add("share", len(self._sources), shares.flatten())

    def _add_effects(self, products: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Set the effects of the next edges, given the products of their parts with vectors."""
        for name, vectors in (
            ("logit_contribution", self.directions),
            ("attribution", self.gradients if self._attributes else None),
        ):
            if vectors is not None:
                self._scalars.add(name, len(self._sources), products(vectors))

    def shows_edges(self, sources: Sequence[str], targets: Sequence[str]) -> bool:
        """Return whether at least one of these edges is kept."""
        return bool(self._between_shown(sources, targets))

    def _between_shown(self, sources: Sequence[str], targets: Sequence[str]) -> Sequence[int]:
        """Return the indices of edges between two kept nodes."""
        if self._hidden.isdisjoint(sources) and self._hidden.isdisjoint(targets):
            return range(len(sources))
        return [
            i
            for i, ends in enumerate(zip(sources, targets, strict=True))
            if self._hidden.isdisjoint(ends)
        ]

    def build(self) -> Flow:
        """Return the collected nodes and edges; their numbers start to cross from the device."""
        built, self._vectors = self._vectors, []  # `_numbers` keeps the builder
        nodes = Nodes(self._ids, coordinates(self._runs))
        vectors = torch.cat(built) if built else torch.empty(0, 0)
        projected, states = np.array(self._projected, np.bool_), self._states
        order = _by_position(nodes.column(NodeColumn.POSITION))
        if order is not None:
            ids = [self._ids[i] for i in order.tolist()]
            nodes, projected = Nodes(ids, nodes.coordinates[order]), projected[order]
            vectors = vectors[to_device(order, vectors.device)] if built else vectors
            place = order.argsort()
            states = place[states].tolist()
        gradients = self._state_gradients
        return Flow(
            nodes=nodes,
            vectors=vectors,
            projected=projected,
            states=states,
            gradients=torch.stack(gradients) if gradients else torch.empty(0, 0),
            numbers=cache(partial(self._numbers, self._scalars.send(), order)),
        )

    def _numbers(self, scalars: Scalars, order: Ints | None) -> Numbers:
        edges = len(self._sources)
        nodes = dict.fromkeys(("norm", "activation"), len(self._ids))
        columns = scalars.columns(nodes | dict.fromkeys(_EDGE_COLUMNS, edges))
        norms, activations = columns["norm"], columns["activation"]
        found = Edges(
            self._sources,
            self._targets,
            np.array(self._kinds, np.int64),
            weights=columns["weight"],
            shares=columns["share"],
            attention=columns["attention"],
            logit_contributions=columns["logit_contribution"],
            attributions=columns["attribution"],
            overlaps=np.full(edges, np.nan),
        )
        if order is not None:
            norms, activations = norms[order], activations[order]
        of_edges = _by_position(np.array(self._edge_positions, np.int64))
        return Numbers(norms, activations, found if of_edges is None else found.rows(of_edges))


def _by_position(positions: Ints) -> Ints | None:
    """Return the order `[n]` of ascending positions; None if they are in order already."""
    if (positions[1:] >= positions[:-1]).all():
        return None
    return positions.argsort(kind="stable")
