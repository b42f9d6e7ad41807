"""A trace: the flow graph of a forward pass, its layers, paths and norms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from os import PathLike
from typing import TYPE_CHECKING, Literal

from januslens.results.comparison import TraceComparison, compare_traces
from januslens.results.contributions import ContributionTree, contribution_tree
from januslens.results.exports import (
    PageFrame,
    figure_of,
    json_lines,
    notebook_html,
    page_html,
)
from januslens.results.graph import Edge, GraphView, KnownNodes, Node, Part, Parts
from januslens.results.graph_files import GraphFormat, write_graph
from januslens.results.kinds import CRITERIA, Criterion, EdgeKind, NodeKind
from januslens.results.lazy import LazySequence
from januslens.results.message_file import save_messages
from januslens.results.models import Guarantee, LayerLevel, ModelSizes, Provenance, StageTime
from januslens.results.tokens import Token, TokenTable
from januslens.v1 import trace_pb2

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PositionTarget:
    """The target at one position, with its rank and probability in the model's prediction.

    Attributes:
        position: The query position.
        target: The requested target, or the model's own prediction.
        predicted: The model's own prediction.
        target_probability: Probability of the target in the prediction.
        target_log_probability: Natural logarithm of this probability, which does not underflow.
        target_rank: Rank of the target in the prediction; 0 = it is the prediction.
        target_logit: Logit of the target.
        constant_logit_contribution: Contribution of the biases of the final norm and the head. With
            all other contributions it adds up to the target's logit before the soft-cap, or with a
            second token to the logit difference.
        logit_difference: The target's logit minus that of the second token, if there is one.
    """

    position: int
    target: Token
    predicted: Token
    target_probability: float
    target_log_probability: float
    target_rank: int
    target_logit: float
    constant_logit_contribution: float
    logit_difference: float | None = None

    @classmethod
    def from_message(cls, message: trace_pb2.PositionTarget, tokens: TokenTable) -> PositionTarget:
        """Read one target; `tokens` has its texts."""
        return cls(
            position=message.position,
            target=tokens[message.target_token_id],
            predicted=tokens[message.predicted_token_id],
            target_probability=message.target_probability,
            target_log_probability=message.target_log_probability,
            target_rank=message.target_rank,
            target_logit=message.target_logit,
            constant_logit_contribution=message.constant_logit_contribution,
            logit_difference=message.logit_difference
            if message.HasField("logit_difference")
            else None,
        )


@dataclass(frozen=True)
class TraceHeader:
    """Prompt, layers and targets of a trace; the first event of its stream.

    Attributes:
        request_id: Id of the call, as in the server's log.
        provenance: The model's revision, data type, device and library versions.
        sizes: The model's layers, heads, neurons and tokens.
        prompt_tokens: The prompt's tokens, one per position.
        layers: The layers that the stream sends, ascending.
        targets: The target of each traced position.
        other: The second token of a logit difference, if requested.
        selected_by: The score by which heads, sources and neurons were selected.
        limited_layers: The requested layers whose parts are not all shown, and why.
    """

    request_id: str
    provenance: Provenance
    sizes: ModelSizes
    prompt_tokens: tuple[Token, ...]
    layers: tuple[int, ...]
    targets: tuple[PositionTarget, ...]
    other: Token | None = None
    selected_by: Criterion = Criterion.UNSPECIFIED
    limited_layers: tuple[LayerLevel, ...] = ()

    @classmethod
    def from_message(cls, message: trace_pb2.TraceHeader, tokens: TokenTable) -> TraceHeader:
        """Read the header."""
        return cls(
            request_id=message.request_id,
            provenance=Provenance.from_message(message.provenance),
            sizes=ModelSizes.from_message(message.sizes),
            prompt_tokens=tuple(Token.from_message(t) for t in message.prompt_tokens),
            layers=tuple(message.layers),
            targets=tuple(PositionTarget.from_message(t, tokens) for t in message.targets),
            other=tokens[message.other_token_id] if message.HasField("other_token_id") else None,
            selected_by=CRITERIA.member(message.selected_by),
            limited_layers=tuple(
                LayerLevel.from_message(level) for level in message.limited_layers
            ),
        )


@dataclass(frozen=True)
class TraceSummary:
    """The last event of a Trace; a stream without one is incomplete.

    Attributes:
        nodes: Number of nodes sent.
        edges: Number of edges sent.
        times: Seconds by stage on the server.
        checks: Results of the checks; empty unless requested.
        constant_logit_contribution: That of `PositionTarget`, if only one position is traced.
    """

    nodes: int
    edges: int
    times: tuple[StageTime, ...]
    checks: tuple[Guarantee, ...]
    constant_logit_contribution: float | None

    @classmethod
    def from_message(cls, message: trace_pb2.TraceSummary) -> TraceSummary:
        """Read the summary."""
        has_constant = message.HasField("constant_logit_contribution")
        return cls(
            nodes=message.nodes,
            edges=message.edges,
            times=tuple(StageTime.from_message(t) for t in message.times),
            checks=tuple(Guarantee.from_message(g) for g in message.checks),
            constant_logit_contribution=message.constant_logit_contribution
            if has_constant
            else None,
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerGraph(GraphView):
    """The nodes and edges of one block."""

    layer: int

    def __repr__(self) -> str:
        """A one-line description, because there may be thousands of nodes."""
        counts = f"{len(self.node_list)} nodes, {len(self.edge_list)} edges"
        return f"<LayerGraph of layer {self.layer}: {counts}>"

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)

    @classmethod
    def from_message(
        cls,
        message: trace_pb2.LayerGraph,
        tokens: TokenTable,
        earlier: Sequence[LayerGraph],
        prompt: Sequence[Token] = (),
    ) -> LayerGraph:
        """Read one whole layer; its edges may come from nodes of `earlier` layers."""
        nodes = LazySequence.of(message.nodes, lambda node: Node.from_message(node, tokens))
        return cls(
            layer=message.layer,
            node_list=nodes,
            edge_list=LazySequence.of(message.edges, Edge.from_message),
            known_nodes=KnownNodes([*(layer.node_list for layer in earlier), nodes]),
            prompt=prompt,
        )


@dataclass(frozen=True, slots=True)
class NormEffect:
    """How a norm changes the top tokens of a vector (VISIT, section 5.2).

    Attributes:
        before: The node before the norm.
        after: The node after the norm.
        removed: Top tokens of `before` that are not top tokens of `after`, best first.
        kept: Top tokens of both, best first.
        added: Top tokens of `after` that are not top tokens of `before`, best first.
        overlap: Fraction of the top tokens that are kept (VISIT's intersection score).
    """

    before: Node
    after: Node
    removed: tuple[Token, ...]
    kept: tuple[Token, ...]
    added: tuple[Token, ...]
    overlap: float


def norm_effects(graph: GraphView) -> list[NormEffect]:
    """Return the effect of each norm between two nodes with projections."""
    return list(_effects(graph))


def _effects(graph: GraphView) -> Iterator[NormEffect]:
    for edge in graph.edge_list:
        if edge.kind is not EdgeKind.NORM:
            continue
        before, after = graph.node(edge.source), graph.node(edge.target)
        if before.projection and after.projection and before.projection.top:
            yield _effect(before, after, before.projection.top_tokens, after.projection.top_tokens)


def _effect(
    before: Node, after: Node, tops: tuple[Token, ...], tops_after: tuple[Token, ...]
) -> NormEffect:
    kept = tuple(token for token in tops if token in tops_after)
    return NormEffect(
        before=before,
        after=after,
        removed=tuple(token for token in tops if token not in tops_after),
        kept=kept,
        added=tuple(token for token in tops_after if token not in tops),
        overlap=len(kept) / len(tops),
    )


# The smallest parts that add up to the residual stream, without counting anything twice.
_COMPONENTS = {
    NodeKind.BLOCK_INPUT,
    NodeKind.HEAD_OUTPUT,
    NodeKind.ATTENTION_BIAS,
    NodeKind.MIXER_HEAD,
    NodeKind.MLP_VALUE,
    NodeKind.MLP_BIAS,
}
_SUMS_OF_COMPONENTS = {
    NodeKind.ATTENTION_CONCAT,
    NodeKind.MIXER_OUTPUT,
    NodeKind.MLP_SUM,
    NodeKind.MLP_OUTPUT,
}
# The residual stream. Of a layer without parts, what is added to it are the components.
_RESIDUALS = {NodeKind.BLOCK_INPUT, NodeKind.RESIDUAL_MID, NodeKind.BLOCK_OUTPUT}


@dataclass(frozen=True, kw_only=True, repr=False)
class Trace(GraphView):
    """The flow graph of one forward pass (VISIT; Katz & Belinkov, 2023).

    Attributes:
        header: Prompt, targets and provenance.
        layers: The requested layers, ascending.
        summary: Counts, times and check results; None if the stream was interrupted.
        responses: The messages that this result was read from.
    """

    header: TraceHeader
    layers: tuple[LayerGraph, ...]
    summary: TraceSummary | None
    responses: tuple[trace_pb2.TraceResponse, ...] = field(repr=False, compare=False)

    @classmethod
    def from_parts(
        cls,
        header: TraceHeader,
        layers: Sequence[LayerGraph],
        summary: TraceSummary | None,
        responses: Sequence[trace_pb2.TraceResponse],
    ) -> Trace:
        """Combine the events of a stream."""
        nodes = [layer.node_list for layer in layers]
        edges = [layer.edge_list for layer in layers]
        return cls(
            header=header,
            layers=tuple(layers),
            summary=summary,
            responses=tuple(responses),
            node_list=LazySequence(sum(map(len, nodes)), lambda: chain.from_iterable(nodes)),
            edge_list=LazySequence(sum(map(len, edges)), lambda: chain.from_iterable(edges)),
            known_nodes=KnownNodes(nodes),
            prompt=header.prompt_tokens,
        )

    @property
    def prompt_tokens(self) -> tuple[Token, ...]:
        """The prompt's tokens, one per position."""
        return self.header.prompt_tokens

    @property
    def targets(self) -> tuple[PositionTarget, ...]:
        """The target of each traced position."""
        return self.header.targets

    @property
    def provenance(self) -> Provenance:
        """The model's revision, data type, device and library versions."""
        return self.header.provenance

    def layer(self, number: int) -> LayerGraph:
        """Return one layer; a negative number counts from the last layer of the model.

        Raises:
            KeyError: The layer was not traced.
        """
        number += self.header.sizes.n_layers if number < 0 else 0
        for layer in self.layers:
            if layer.layer == number:
                return layer
        traced = ", ".join(str(layer.layer) for layer in self.layers)
        raise KeyError(f"layer {number} is not in the trace; expected one of {traced or 'none'}")

    def target(self, position: int | None = None) -> PositionTarget:
        """Return the target at a position, by default the last traced position.

        A negative position counts from the end of the prompt, as in a request.

        Raises:
            KeyError: The position was not traced.
        """
        by_position = {target.position: target for target in self.targets}
        wanted = max(by_position) if position is None else self._from_start(position)
        if wanted not in by_position:
            known = ", ".join(map(str, sorted(by_position)))
            raise KeyError(f"position {position} was not traced; expected one of {known}")
        return by_position[wanted]

    def explained(self, position: int | None = None) -> str:
        """Name what contributions add up to at a position, by default the last traced one.

        For example "logit of ␣Paris", or "logit of ␣Paris minus that of ␣Rome" with a second token.

        Raises:
            KeyError: The position was not traced.
        """
        difference = "" if self.header.other is None else f" minus that of {self.header.other}"
        return f"logit of {self.target(position).target}{difference}"

    def why(self, position: int | None = None, *, at_most: int = 16) -> ContributionTree:
        """Return which parts of the pass add up to the target's logit, as a tree.

        The tree leads from the logit to the results of attention and MLP in all layers, to heads
        and neurons, and to the source positions that the heads read. Nodes are listed in the order
        of their absolute contributions, and the contributions of all others are summed up in the
        `rest` of the node that they are part of. If the model's last layer was not traced, the tree
        is that of the residual stream after the last traced layer.

        Args:
            position: The query position, negative from the end; None = the last traced one.
            at_most: Maximum number of nodes to list.

        Raises:
            ValueError: The trace was requested without logit contributions, or without the parts of
                the residual stream.
            KeyError: The position was not traced.
        """
        target = self.target(position)
        outputs = self.nodes_of(NodeKind.BLOCK_OUTPUT, target.position)
        own = [node for node in outputs if node.layer == self.layers[-1].layer]
        at_end = self.layers and self.layers[-1].layer == self.header.sizes.n_layers - 1
        constant = target.constant_logit_contribution if at_end else 0.0
        tree = contribution_tree(self, own[0], constant, at_most) if own else None
        if tree is None:
            raise ValueError(
                "the trace has no contributions to the residual stream; request it with "
                "logit_contribution=True, and with node_kinds that include BLOCK_OUTPUT, "
                "RESIDUAL_MID, ATTENTION_OUTPUT and MLP_OUTPUT"
            )
        return tree

    def contributions(
        self,
        position: int | None = None,
        by: Literal["logit_contribution", "attribution"] = "logit_contribution",
    ) -> Parts:
        """Return the components by their effect on the target's logit, largest first.

        The components are the embedding, heads, neurons, biases, and the rest of each sum. Of a
        layer without known parts, they are its sublayers, or all that the block adds. A mixer is
        one component, or its heads if the trace has them. Each summand of the residual stream is
        listed once. If all layers are traced, the contributions and the
        `constant_logit_contribution` add up to the target's logit before the soft-cap.

        Args:
            position: Position of the components, by default the last traced one.
            by: `logit_contribution`, the direct effect, or `attribution`, the first-order effect on
                the logit at the last traced position through all paths.

        Raises:
            ValueError: The trace was requested without these effects, or without the parts or the
                sums that have them, or `by` is neither of the two.
            KeyError: The position was not traced.
        """
        at = self.target(position).position
        if by not in ("logit_contribution", "attribution"):
            raise ValueError(
                f"unknown effect {by!r}; expected 'logit_contribution' or 'attribution'"
            )
        parts = [part for part in self._components(at) if getattr(part, by) is not None]
        sums = [edge for edge in self.edge_list if edge.kind is EdgeKind.PART]
        if not parts and (not sums or any(getattr(edge, by) is not None for edge in sums)):
            raise ValueError(
                "the trace has no parts of sums; expected node_kinds to have parts together with "
                "their sums, such as HEAD_OUTPUT with ATTENTION_CONCAT, MLP_VALUE with MLP_OUTPUT"
            )
        if not parts:
            raise ValueError(
                f"the trace has no {by.replace('_', ' ')}s; request them with {by}=True"
            )
        largest = sorted(parts, key=lambda part: -(getattr(part, by) or 0.0))
        return Parts(largest, self.prompt)

    def _components(self, position: int) -> Iterator[Part]:
        limited = {level.layer for level in self.header.limited_layers}
        edges = [edge for edge in self.edge_list if edge.kind is EdgeKind.PART]
        divided = {edge.target for edge in edges}
        for edge in edges:
            source, target = self.node(edge.source), self.node(edge.target)
            rest = source.kind is NodeKind.OTHER and target.kind in _SUMS_OF_COMPONENTS
            if target.kind in _RESIDUALS and source.id not in divided:
                sublayer = source.kind is NodeKind.MIXER_OUTPUT or target.layer in limited
                rest |= sublayer and source.kind not in _RESIDUALS
            if source.position == position and (source.kind in _COMPONENTS or rest):
                yield Part(source, edge)

    def norm_effects(self) -> list[NormEffect]:
        """Return which top tokens each norm removed and added."""
        return norm_effects(self)

    def compare(
        self, other: Trace, *, positions: Mapping[int, int] | Literal["shared"] | None = None
    ) -> TraceComparison:
        """Compare this trace with another one of the same prompt, or of a similar one.

        The other trace may be of another model, of another revision, or of a pass with
        interventions. Nodes are aligned by their ids.

        Args:
            other: The other trace.
            positions: For another prompt: the position of `other` for each position of this trace.
                Nodes at other positions are left out. `shared` = the tokens at the start and at the
                end that both prompts have, and the last tokens. None = the positions are the same.

        Raises:
            ValueError: The prompts have different lengths, and `positions` is None.
        """
        return compare_traces(self, other, positions)

    def __repr__(self) -> str:
        """A one-line description, because there may be thousands of nodes."""
        prompt = "".join(token.text for token in self.prompt_tokens)
        positions = ", ".join(str(target.position) for target in self.targets)
        return (
            f"<Trace of {prompt!r} at {positions}: {len(self.layers)} layers, "
            f"{len(self.node_list)} nodes, {len(self.edge_list)} edges>"
        )

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)

    def show(self, overview: Trace | None = None, *, height: int = 800) -> PageFrame:
        """Show the page of `to_html` in a notebook; `height` is in pixels."""
        return PageFrame(self.to_html(overview), height)

    def figure(
        self,
        kind: Literal["why", "lens", "heads"] = "why",
        *,
        position: int | None = None,
        at_most: int = 10,
        ax: Axes | None = None,
    ) -> Figure:
        """Draw a figure with matplotlib, for example for a paper. Requires matplotlib.

        Args:
            kind: `why`, the tree of `why()` as bars; `lens`, the target's rank and probability
                along the residual stream; or `heads`, what each head adds to the target's logit.
            position: The query position, negative from the end; None = the last traced one.
            at_most: Maximum number of nodes of `why`.
            ax: The axes to draw in; None = those of a new figure, which is not in pyplot's list of
                open figures.

        Raises:
            ValueError: The kind is unknown, or the trace does not have what the figure shows.
            KeyError: The position was not traced.
        """
        return figure_of(self, ax, kind=kind, position=position, at_most=at_most)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the messages of the stream to a file that `januslens.load` reads.

        Raises:
            OSError: The file cannot be written.
        """
        save_messages(path, self.responses)

    def export(self, path: str | PathLike[str], file_format: GraphFormat | None = None) -> None:
        """Write the flow graph to a file that other programs read.

        GraphML, GEXF and node-link JSON have all nodes and edges with their attributes, and require
        networkx. A circuit-tracer file, which Neuronpedia also reads, has the parts of the target's
        logit at the last traced position.

        Args:
            path: The file.
            file_format: `graphml`, `gexf`, `node-link` or `circuit-tracer`; None = by the extension
                of the file: `.graphml`, `.gexf`, or `.json` for node-link JSON.

        Raises:
            ValueError: The format or the extension is unknown; or the format is `circuit-tracer`,
                and the trace has no contributions to the logit (see `why`).
            OSError: The file cannot be written.
        """
        write_graph(self, path, file_format)

    def to_json_lines(self) -> Iterable[str]:
        """Return the stream as canonical protobuf JSON, one message per line, like `--json`."""
        return json_lines(self.responses)

    def to_html(self, overview: Trace | None = None) -> str:
        """Return this trace as a page: one HTML file that needs no network.

        Args:
            overview: The result of `client.trace_overview(trace)`, with the residual stream at all
                positions. Without it, the page shows only the positions of this trace.
        """
        return page_html(self, overview)
