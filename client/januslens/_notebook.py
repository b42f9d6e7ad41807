"""The HTML that a notebook shows for each kind of result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from xml.etree.ElementTree import Element

from januslens import _html as cells
from januslens import _presentation as presentation
from januslens._html import Child, cut, document, element, heading, literal, note, table
from januslens.results.activations import Activations, SiteTensor
from januslens.results.comparison import TraceComparison
from januslens.results.exports import PageFrame, notebook_html
from januslens.results.generation import GeneratedText
from januslens.results.gradient import EditPreview, Gradient
from januslens.results.graph import Part
from januslens.results.heat_map import HeatMap
from januslens.results.intervene import InterventionEffect, InterventionEffects
from januslens.results.kinds import MatrixKind, NodeKind, Side, Site
from januslens.results.matrices import Component, Matrix
from januslens.results.models import Model, Models
from januslens.results.sweep import Sweep
from januslens.results.tokens import Token, Tokens
from januslens.results.trace import LayerGraph, PositionTarget, Trace
from januslens.results.vectors import FoundNeurons, Projection, Projections

_TOKENS = 3
_ROWS = 8
_POSITIONS = 12


@notebook_html.register
def trace_html(trace: Trace) -> str:
    """The residual stream over the layers, and the parts that contribute most to the target."""
    parts: list[Element] = [heading("Trace", trace.prompt_tokens, trace.provenance)]
    if len(trace.targets) > 1:
        parts.append(_residual_grid(trace))
    if trace.targets:
        target = trace.target()
        parts += [
            cells.sentence(presentation.target_sentence(trace, target), [target.target]),
            _emergence(trace, target),
            _contributions(trace),
        ]
    hint = note("show() opens the interactive page; nodes and edges are pandas frames")
    return document(*parts, *cut(trace.summary is not None), hint)


@notebook_html.register
def layer_html(layer: LayerGraph) -> str:
    """One layer: its heads and neurons, largest share first."""
    positions = sorted({node.position for node in layer.node_list if node.position is not None})
    parts = [element("p", element("b", f"Layer {layer.layer}"))]
    for position in positions[-1:]:
        where = f"at position {position}"
        for name, kind in (("Heads", NodeKind.HEAD_OUTPUT), ("Neurons", NodeKind.MLP_VALUE)):
            listed = layer.parts_of_kind(kind, position)[:_ROWS]
            parts.append(_shares(f"{name} {where}", listed))
    return document(*parts, note("share: of the layer's heads, or of the MLP's output"))


@notebook_html.register
def activations_html(activations: Activations) -> str:
    """One row per site: its layers, dimensions and data type."""
    sites: dict[Site, list[SiteTensor]] = {}
    for tensor in activations.tensors:
        sites.setdefault(tensor.site, []).append(tensor)
    rows = (
        (
            str(site),
            ", ".join(str(tensor.layer) for tensor in found if tensor.layer is not None),
            ", ".join(
                f"{name} {size}"
                for name, size in zip(found[0].dimensions, found[0].tensor.shape, strict=True)
            ),
            found[0].tensor.data_type,
        )
        for site, found in sites.items()
    )
    return document(
        heading("Activations", activations.prompt_tokens, activations.provenance),
        table("Tensors", ("site", "layers", "dimensions", "data type"), rows),
        *cut(activations.summary is not None),
        note("array(site, layer) is a numpy array; save() writes a safetensors file"),
    )


@notebook_html.register
def sweep_html(sweep: Sweep) -> str:
    """The change of the logit by layer (rows) and column."""
    return document(
        _heat_map(sweep.heat_map()),
        note("blue: decrease, red: increase; to_pandas() has the probabilities"),
    )


@notebook_html.register
def heat_map_html(found: HeatMap) -> str:
    """The figures by row and column."""
    return document(_heat_map(found), note("blue: decrease, red: increase"))


def _heat_map(found: HeatMap) -> Element:
    """A table with a coloured cell for each figure."""
    largest, digits = found.largest, found.digits
    rows: Iterable[list[Child]] = (
        [label.removeprefix("layer"), *(cells.change_cell(v, largest, digits) for v in row)]
        for label, row in found.printed_rows()
    )
    made = table(found.title, [f">{found.row_axis}", *found.columns], rows)
    made.set("class", "m")
    return made


_MAPS = 8


@notebook_html.register
def effects_html(effects: InterventionEffects) -> str:
    """The experiments that were listed, and the sweep as heat maps."""
    parts = [heading("Effects", effects.prompt_tokens, effects.provenance)]
    for before in effects.before:
        found = presentation.prediction_sentence(before, effects.prompt_tokens)
        parts.append(cells.sentence(found, [before.target]))
    listed = [effect for effect in effects.effects if not effect.coordinates]
    if listed:
        rows = (row for effect in listed for row in _effect_rows(effects, effect))
        headings = (">number", "label", "target", "before", "after", ">rank", ">logit", ">KL, nats")
        parts.append(table("Experiments", (*headings, "prediction"), rows))
    maps = effects.heat_maps()
    parts += map(_heat_map, maps[:_MAPS])
    if len(maps) > _MAPS:
        parts.append(note(f"{len(maps) - _MAPS} more maps in heat_maps()"))
    hint = "blue: decrease, red: increase; to_pandas() and to_xarray() have all figures"
    return document(*parts, *cut(effects.summary is not None), note(hint))


def _effect_rows(
    effects: InterventionEffects, effect: InterventionEffect
) -> Iterator[Iterable[Child]]:
    for before, after in zip(effects.before, effect.after, strict=True):
        yield (
            str(effect.experiment),
            literal(effect.label),
            cells.tokens([after.target]),
            cells.probability_bar(before.probability, before.log_probability),
            cells.probability_bar(after.probability, after.log_probability),
            f"{before.rank} → {after.rank}",
            cells.signed(after.logit - before.logit),
            presentation.measure(after.kl_nats),
            cells.tokens([token for token, _ in after.top[:1]], [after.target]),
        )


@notebook_html.register
def comparison_html(comparison: TraceComparison) -> str:
    """The residual stream of two traces, and the contributions that differ most."""
    parts = _compared(comparison, _ROWS)
    return document(
        *parts, note("show() opens the interactive page; nodes and edges are pandas frames")
    )


def _compared(comparison: TraceComparison, rows: int) -> list[Element]:
    before, after = comparison.before, comparison.after
    parts = [
        heading("Trace", before.prompt_tokens, before.provenance),
        heading("Compared with", after.prompt_tokens, after.provenance),
        table(
            "Residual stream at the last position",
            (">layer", "before", "after", ">rank", "probability before", "probability after"),
            _compared_residuals(comparison),
        ),
    ]
    edges = comparison.edge_list
    if comparison.different_parts:
        parts.append(note(comparison.different_parts))
    elif any(edge.contribution_difference is not None for edge in edges):
        parts.append(_compared_contributions(comparison, rows))
    return parts


def _compared_residuals(comparison: TraceComparison) -> Iterator[Iterable[Child]]:
    at = comparison.before.target().position if comparison.before.targets else None
    for pair in comparison.node_list:
        before, after = pair.before.projection, pair.after.projection
        wanted = pair.before.kind is NodeKind.BLOCK_OUTPUT and pair.before.position == at
        if wanted and before and after:
            yield (
                str(pair.before.layer),
                cells.tokens(before.top_tokens[:_TOKENS]),
                cells.tokens(after.top_tokens[:_TOKENS]),
                f"{before.target_rank} → {after.target_rank}",
                cells.probability_bar(before.target_probability, before.target_log_probability),
                cells.probability_bar(after.target_probability, after.target_log_probability),
            )


def _compared_contributions(comparison: TraceComparison, rows: int) -> Element:
    found = (
        (
            cells.signed(edge.before.logit_contribution),
            cells.signed(edge.after.logit_contribution),
            literal(edge.before.source),
        )
        for edge in comparison.changed_contributions()[:rows]
    )
    return table("Contributions that differ most", (">logit before", ">after", "node"), found)


def _residual_grid(trace: Trace) -> Element:
    """A grid of layers (rows) and positions: the top token, coloured by the target's rank."""
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
        return cells.rank_cell(
            top, read.target_rank if read else None, trace.header.sizes.vocab_size
        )

    made = table(
        "Residual stream after each layer",
        [
            ">layer",
            *(presentation.token_at(position, trace.prompt_tokens) for position in positions),
        ],
        (
            [str(layer.layer), *(cell(layer.layer, position) for position in positions)]
            for layer in reversed(trace.layers)
        ),
    )
    made.set("class", "m")
    return element("div", made, note("top token; the darker, the higher its position's target"))


def _emergence(trace: Trace, target: PositionTarget) -> Element:
    steps = list(presentation.all_residual_steps(trace, target.position))
    rows = _residual_rows(presentation.folded_steps(steps, _ROWS), target)
    headings = (">layer", "residual", "top tokens", ">rank", "probability", ">logit")
    return table(f"{target.target} in the residual stream, layer by layer", headings, rows)


def _residual_rows(
    steps: Iterable[presentation.ResidualStep | presentation.FoldedSteps], target: PositionTarget
) -> Iterator[Iterable[Child]]:
    previous: int | None = None
    for step in steps:
        if isinstance(step, presentation.FoldedSteps):
            added = cells.signed(step.contribution)
            yield step.layers, f"{len(step.steps)} steps that add little", "", step.ranks, "", added
            previous = None
        elif read := step.node.projection:
            yield (
                "" if step.layer == previous else str(step.layer),
                step.name,
                cells.tokens(read.top_tokens[:_TOKENS], [target.target]),
                cells.rank(read.target_rank),
                cells.probability_bar(read.target_probability, read.target_log_probability),
                cells.signed(step.contribution),
            )
            previous = step.layer


def _contributions(trace: Trace) -> Element:
    if not any(edge.logit_contribution is not None for edge in trace.edge_list):
        return note("no logit contributions were requested")
    rows = (
        (
            cells.signed(part.logit_contribution),
            presentation.node_name(part.node, trace.prompt_tokens),
            cells.tokens(presentation.written_tokens(part.node)[:_TOKENS], [trace.target().target]),
        )
        for part in trace.contributions()[:_ROWS]
    )
    return table(
        f"Largest contributions to the {trace.explained()}", (">logit", "node", "top tokens"), rows
    )


def _shares(title: str, parts: Iterable[Part]) -> Element:
    rows = (
        (
            cells.percent(part.share),
            cells.signed(part.logit_contribution),
            presentation.node_name(part.node, ()),
            cells.tokens(presentation.written_tokens(part.node)[:_TOKENS]),
        )
        for part in parts
    )
    return table(title, (">share", ">logit", "node", "top tokens"), rows)


@notebook_html.register
def gradient_html(gradient: Gradient) -> str:
    """The tokens of the inputs or VJPs, by layer and position."""
    header = gradient.header
    pictures = [_factor_grid(gradient, kind) for kind in presentation.kinds_of(gradient)]
    return document(
        heading("Gradient", gradient.prompt_tokens, gradient.provenance),
        cells.sentence(presentation.loss_sentence(gradient), header.targets),
        *pictures,
        *cut(gradient.summary is not None),
        note("show() opens the interactive page; to_pandas() is a frame of the components"),
    )


@notebook_html.register
def matrix_html(matrix: Matrix) -> str:
    """One matrix: its largest components."""
    imprint = matrix.projected_side is Side.INPUT
    readings = ("top tokens of x",) if imprint else ("promotes", "suppresses")
    rows = (_component_row(component, imprint) for component in matrix.components[:_ROWS])
    shown = min(len(matrix.components), _ROWS)
    return document(
        table(
            f"{matrix.name} [{matrix.d_in}, {matrix.d_out}]: "
            f"norm {presentation.measure(matrix.frobenius_norm)}, "
            f"{shown} of {matrix.component_count} components",
            (">position", ">|x|", ">|δ|", ">size", *readings),
            rows,
        )
    )


def _component_row(component: Component, imprint: bool) -> Iterator[Child]:
    yield str(component.position)
    for norm in (component.input_norm, component.vjp_norm, component.size):
        yield presentation.measure(norm)
    for found in _readings(component, imprint):
        yield cells.tokens(found[:_TOKENS])


def _readings(component: Component, imprint: bool) -> list[tuple[Token, ...]]:
    if imprint:
        return [component.projection.top_tokens if component.projection else ()]
    return [component.promoted, component.suppressed]


def _factor_grid(gradient: Gradient, kind: MatrixKind | str) -> Element:
    matrices = gradient.of_kind(kind)
    imprint = matrices[0].projected_side is Side.INPUT
    positions = list(range(len(gradient.prompt_tokens)))[-_POSITIONS:]
    # If several experts have components at a position, only the largest is shown.
    found = {
        (matrix.layer, part.position): part
        for matrix in matrices
        for part in sorted(matrix.components, key=lambda part: part.size)
    }
    norms = ((position, part.vjp_norm) for (_, position), part in found.items())
    largest, beyond = presentation.norm_limit(norms, gradient.prompt_tokens)
    layers = sorted({matrix.layer for matrix in matrices}, reverse=True)
    made = table(
        presentation.factor_title(matrices[0]),
        [
            ">layer",
            *(presentation.token_at(position, gradient.prompt_tokens) for position in positions),
        ],
        (
            [
                str(layer),
                *(
                    _factor_cell(
                        found.get((layer, position)), imprint, largest, gradient.header.targets
                    )
                    for position in positions
                ),
            ]
            for layer in layers
        ),
    )
    made.set("class", "m")
    says = "x's top token" if imprint else "↑ the token that a descent step promotes most, ↓ the"
    says += "" if imprint else " one that it suppresses most"
    scale = f"colour: |δ|, square-root scale, 0 to {presentation.measure(largest)}"
    scale += f", {beyond}" if beyond else ""
    return element("div", made, note(f"{says}; {scale}"))


def _factor_cell(
    component: Component | None, imprint: bool, largest: float, sought: Sequence[Token]
) -> Element:
    if component is None or component.size == 0:
        return element("td", "·", classes="h d")
    read = component.projection
    lines: list[Child] = (
        [cells.tokens(read.top_tokens[:1] if read else ())]
        if imprint
        else _marked(component, sought)
    )
    return cells.norm_cell(lines, component.vjp_norm, largest)


def _marked(component: Component, sought: Sequence[Token]) -> list[Child]:
    """The most promoted and the most suppressed token; targets are emphasised."""
    ends = (("↑ ", component.promoted), ("↓ ", component.suppressed))
    return [element("span", mark, cells.tokens(end[:1], sought)) for mark, end in ends]


@notebook_html.register
def preview_html(preview: EditPreview) -> str:
    """One row per prompt, with the figures before and after the edit."""
    rows = (
        (
            literal(effect.label) if effect.label else "the edited prompt",
            cells.tokens([effect.target]),
            cells.probability_bar(effect.probability_before, effect.log_probability_before),
            cells.probability_bar(effect.probability_after, effect.log_probability_after),
            f"{effect.rank_before} → {effect.rank_after}",
            element(
                "span",
                cells.tokens([effect.predicted_before]),
                " → ",
                cells.tokens([effect.predicted_after]),
            ),
            f"{effect.kl_bits:.3g}",
        )
        for effect in (preview.edited, *preview.probes)
    )
    headings = ("prompt", "target", "before", "after", ">rank", "prediction", ">KL, bits")
    return document(
        table("Edit preview", headings, rows),
        note("before, after: the target's probability; KL: divergence between both predictions"),
    )


_ALTERNATIVES = 3


@notebook_html.register
def generated_html(text: GeneratedText) -> str:
    """One row per token."""
    rows = (
        (
            literal(str(made.token)),
            cells.probability_bar(math.exp(made.log_probability), made.log_probability),
            f"{made.entropy_bits:.2f}",
            "" if made.decided is None else str(made.decided),
            cells.tokens([token for token, _ in made.top[:_ALTERNATIVES]], [made.token]),
        )
        for made in text
    )
    headings = ("token", "probability", ">entropy, bits", ">layer", "most likely")
    return document(
        table("Generated text", headings, rows),
        note("layer: the first one read from which the token remains the prediction"),
    )


@notebook_html.register
def neurons_html(found: FoundNeurons) -> str:
    """One row per neuron."""
    verb = "suppress" if found.suppressed else "promote"
    rows = (
        (
            str(hit),
            cells.rank(hit.rank),
            cells.signed(hit.logit),
            cells.tokens(_neuron_tokens(hit.value, found.suppressed), [found.token]),
        )
        for hit in found.neurons
    )
    title = f"{len(found.neurons)} of {found.total} neurons that {verb} {found.token}"
    end = "bottom" if found.suppressed else "top"
    return document(
        table(title, ("neuron", ">rank", ">logit", f"the value's {end} tokens"), rows),
        note(f"rank 0 being the {end}"),
    )


def _neuron_tokens(value: Projection, suppressed: bool) -> tuple[Token, ...]:
    return value.bottom_tokens if suppressed else value.top_tokens


@notebook_html.register
def projections_html(projections: Projections) -> str:
    """One row per vector."""
    rows = (
        (
            str(row),
            cells.tokens(read.top_tokens),
            cells.tokens(read.bottom_tokens),
            f"{read.entropy_bits:.2f}",
            cells.rank(read.target_rank),
        )
        for row, read in enumerate(projections)
    )
    headings = (">row", "top", "bottom", ">entropy, bits", ">target's rank")
    return document(table("Logit lens", headings, rows))


@notebook_html.register
def tokens_html(tokens: Tokens) -> str:
    """One row per token."""
    rows = (
        (str(place), str(token.id), literal(str(token)), literal(token.raw.hex(" ")))
        for place, token in enumerate(tokens)
    )
    return document(table("Tokens", (">position", ">id", "token", "bytes"), rows))


@notebook_html.register
def models_html(models: Models) -> str:
    """One row per model: its state, its sizes and the results of its self-check."""
    headings = (
        "model",
        "state",
        "architecture",
        ">layers",
        ">heads",
        ">d_model",
        ">d_mlp",
        ">vocab",
        ">context",
        "checks",
    )
    return document(table("Models", headings, map(_model_row, models)))


def _model_row(model: Model) -> tuple[Child, ...]:
    sizes = (
        model.n_layers,
        model.n_heads,
        model.d_model,
        model.d_mlp,
        model.vocab_size,
        model.max_positions,
    )
    return (
        literal(model.name),
        model.state,
        model.provenance.architecture,
        *(str(size) if size else "" for size in sizes),
        literal(model.state_reason or presentation.checks(model)),
    )


@notebook_html.register
def projection_html(projection: Projection) -> str:
    """A table of one row."""
    return projections_html(Projections([projection]))


@notebook_html.register
def model_html(model: Model) -> str:
    """A table of one row."""
    return models_html(Models([model]))


@notebook_html.register
def frame_html(page: PageFrame) -> str:
    """A page in an iframe."""
    frame = element(
        "iframe",
        srcdoc=page.html,
        sandbox="allow-scripts allow-downloads allow-popups",
        style=f"width:100%;height:{page.height}px;border:1px solid rgba(128,128,128,.35)",
    )
    return document(frame)
