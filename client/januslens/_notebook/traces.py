"""A trace, or one layer of it, in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

from januslens._notebook import cells
from januslens._notebook.elements import Child, document, element, note, table
from januslens._notebook.heading import cut, heading
from januslens._results.kinds import NodeKind
from januslens._results.residuals import residual_steps
from januslens._results.words import at, in_words, written

if TYPE_CHECKING:
    from januslens._results.graph import Part
    from januslens._results.trace import Trace
    from januslens._results.trace_events import LayerGraph, PositionTarget

_TOKENS = 3
_ROWS = 8
_POSITIONS = 12


def trace_html(trace: Trace) -> str:
    """The residual stream over the layers, and what brought the target."""
    parts: list[Element] = [heading("Trace", trace.prompt_tokens, trace.provenance)]
    if len(trace.targets) > 1:
        parts.append(_picture(trace))
    if trace.targets:
        target = trace.target()
        parts += [_sentence(trace, target), _emergence(trace, target), _contributions(trace)]
    hint = note("show() opens the interactive page; nodes and edges are pandas frames")
    return document(*parts, *cut(trace.summary is not None), hint)


def layer_html(layer: LayerGraph) -> str:
    """One layer: its heads and its neurons, largest share first."""
    positions = sorted({node.position for node in layer.node_list if node.position is not None})
    parts = [element("p", element("b", f"Layer {layer.layer}"))]
    for position in positions[-1:]:
        where = f"at position {position}"
        parts.append(_shares(f"Heads {where}", layer.heads(position)[:_ROWS]))
        parts.append(_shares(f"Neurons {where}", layer.neurons(position)[:_ROWS]))
    return document(*parts, note("share: of all heads, or of the MLP's result"))


def _sentence(trace: Trace, target: PositionTarget) -> Element:
    rest = (
        "the model's own prediction"
        if target.target_rank == 0
        else f"rank {target.target_rank}; the model predicts {target.predicted}"
    )
    return element(
        "p",
        cells.tokens([target.target], [target.target]),
        f" after {at(target.position, trace.prompt_tokens)}: {rest}, ",
        f"probability {cells.probability(target.target_probability)}",
    )


def _picture(trace: Trace) -> Element:
    """Layers upward, positions across: the top token, coloured by the target's rank."""
    positions = [target.position for target in trace.targets][-_POSITIONS:]
    found = {
        (node.layer, node.position): node
        for node in trace.nodes_of(NodeKind.BLOCK_OUTPUT)
        if node.projection
    }

    def cell(layer: int, position: int) -> Element:
        node = found.get((layer, position))
        read = node.projection if node else None
        top = [cells.tokens(read.top_tokens[:1])] if read else []
        return cells.rank_cell(top, read.target_rank if read else None)

    made = table(
        "The residual stream after each layer",
        [">layer", *(at(position, trace.prompt_tokens) for position in positions)],
        (
            [str(layer.layer), *(cell(layer.layer, position) for position in positions)]
            for layer in reversed(trace.layers)
        ),
    )
    made.set("class", "m")
    return element("div", made, note("top token; the darker, the higher its position's target"))


def _emergence(trace: Trace, target: PositionTarget) -> Element:
    rows = (row for layer in trace.layers for row in _steps(trace, layer, target))
    headings = (">layer", "residual", "top tokens", ">rank", "probability", ">logit")
    return table(f"How {target.target} emerges", headings, rows)


def _steps(trace: Trace, layer: LayerGraph, target: PositionTarget) -> Iterator[Iterable[Child]]:
    for place, step in enumerate(residual_steps(trace, layer, target.position)):
        read = step.node.projection
        if read:
            yield (
                "" if place else str(layer.layer),
                step.name,
                cells.tokens(read.top_tokens[:_TOKENS], [target.target]),
                cells.rank(read.target_rank),
                cells.probability_bar(read.target_probability),
                cells.signed(step.added.logit_contribution if step.added else None),
            )


def _contributions(trace: Trace) -> Element:
    if not any(edge.logit_contribution is not None for edge in trace.edge_list):
        return note("no logit contributions were asked for")
    rows = (
        (
            cells.signed(part.logit_contribution),
            in_words(part.node, trace.prompt_tokens),
            cells.tokens(written(part.node)[:_TOKENS], [trace.target().target]),
        )
        for part in trace.contributions()[:_ROWS]
    )
    return table("What adds most to its logit", (">logit", "part", "says"), rows)


def _shares(title: str, parts: Iterable[Part]) -> Element:
    rows = (
        (
            cells.percent(part.share),
            cells.signed(part.logit_contribution),
            in_words(part.node, ()),
            cells.tokens(written(part.node)[:_TOKENS]),
        )
        for part in parts
    )
    return table(title, (">share", ">logit", "part", "says"), rows)
