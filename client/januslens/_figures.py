"""Figures of results, drawn with matplotlib.

They have the data, names and colours of the pages. Unlike the SVG of `_charts.py`, a figure can be
placed in a user's own axes and saved in any format. matplotlib is imported when one is drawn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from januslens import _presentation as presentation
from januslens.results.exports import figure_of, require
from januslens.results.gradient import Gradient
from januslens.results.heat_map import HeatMap
from januslens.results.kinds import MatrixKind, NodeKind, Side
from januslens.results.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

# The colours of the pages' light theme.
_ADDS, _SUBTRACTS, _ANSWER, _QUIET = "#6c7f99", "#c8450f", "#0b4f8a", "#5a6472"
_HEAD_ADDS = "#2868b8"
_LABELLED = 16  # columns with a text in every cell, at most
_ROW = 0.22  # inches


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return the given axes, or those of a new figure of this size in inches."""
    plt = require("matplotlib.pyplot", "figures", "a figure")
    if ax is not None:
        return ax
    figure, made = plt.subplots(figsize=size, layout="constrained")
    plt.close(figure)  # a notebook shows what a cell returns; open figures would be shown again
    found: Axes = made
    return found


def _figure(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("the axes belong to no figure; expected axes such as those of subplots()")
    return figure


# ---- Traces -----------------------------------------------------------------------------------


@figure_of.register(Trace)
def trace_figure(
    trace: Trace, ax: Axes | None, *, kind: str, position: int | None, at_most: int
) -> Figure:
    """Draw one of the figures of a trace; `Trace.figure` documents the arguments."""
    if kind == "why":
        return _contributions(trace, ax, position, at_most)
    if kind == "lens":
        return _lens(trace, ax, position)
    if kind == "heads":
        return figure_of(head_map(trace, position), ax, signed=True)
    raise ValueError(f"unknown figure {kind!r}; expected 'why', 'lens' or 'heads'")


def _contributions(trace: Trace, ax: Axes | None, position: int | None, at_most: int) -> Figure:
    """Draw the contribution tree as bars; the filled ones add up to the logit."""
    tree = trace.why(position, at_most=at_most)
    root, *lines = presentation.contribution_lines(tree, trace)
    ax = _axes(ax, (6.7, 1.2 + _ROW * len(lines)))
    places = list(range(len(lines)))
    for place, line in zip(places, lines, strict=True):
        divided = line.part is not None and bool(line.part.parts)
        colour = _SUBTRACTS if line.contribution < 0 else _ADDS
        ax.barh(
            place,
            line.contribution,
            height=0.7,
            facecolor="none" if divided else colour,
            edgecolor=colour if divided else "white",
            hatch="//" if line.part is None else None,
            linewidth=1.0 if divided else 0.0,
        )
        _number(ax, place, line.contribution)
    names = ["    " * (line.depth - 1) + line.name for line in lines]
    _tree_labels(ax, places, names)
    ax.invert_yaxis()
    ax.axvline(0.0, color=_QUIET, linewidth=0.8)
    ax.margins(x=0.15)
    ax.set_xlabel(
        "direct contribution\noutlined: the sum of the indented bars below", fontsize="small"
    )
    explained = trace.explained(position)
    _title(ax, f"{explained}: {presentation.signed(root.contribution)}")
    _clean(ax)
    return _figure(ax)


def _tree_labels(ax: Axes, places: Sequence[int], names: Sequence[str]) -> None:
    """Label the rows with names that are aligned on the left, so that their indentation shows."""
    directed = [_directed(name) for name in names]
    ax.set_yticks(places, directed, parse_math=False, fontsize="small", ha="left")
    figure = _figure(ax)
    widest = max((label.get_window_extent().width for label in ax.get_yticklabels()), default=0.0)
    ax.tick_params(axis="y", left=False, pad=4 + widest * 72 / figure.dpi)


def _number(ax: Axes, place: int, value: float) -> None:
    ax.annotate(
        presentation.signed(value),
        (value, place),
        xytext=(-3 if value < 0 else 3, 0),
        textcoords="offset points",
        ha="right" if value < 0 else "left",
        va="center",
        fontsize="small",
    )


def _lens(trace: Trace, ax: Axes | None, position: int | None) -> Figure:
    """Draw the target's rank and probability along the residual stream."""
    target = trace.target(position)
    steps = [
        (step, read)
        for step in presentation.all_residual_steps(trace, target.position)
        if (read := step.node.projection) is not None and read.target_rank is not None
    ]
    if not steps:
        raise ValueError(
            "the trace has no residual stream at this position; request it with node_kinds that "
            "include BLOCK_OUTPUT"
        )
    ax = _axes(ax, (6.7, 3.0))
    # Layer 3's attention is at 3.5, and its MLP's result, the input of layer 4, at 4.
    layers = [step.layer for step, _ in steps]
    places = [
        layer + (0.0 if step.name == "input" else 0.5 if layer == after else 1.0)
        for (step, _), layer, after in zip(steps, layers, [*layers[1:], None], strict=True)
    ]
    ax.plot(
        places,
        [1 + (read.target_rank or 0) for _, read in steps],
        color=_ANSWER,
        marker=".",
        label="rank, from 1",
    )
    ax.set_yscale("log")
    ax.invert_yaxis()
    ax.set_xlabel("blocks passed")
    ticker = require("matplotlib.ticker", "figures", "a figure")
    ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    ax.set_ylabel("rank, from 1", color=_ANSWER)
    beside = ax.twinx()
    probabilities = [read.target_probability or 0.0 for _, read in steps]
    beside.fill_between(places, probabilities, color=_ADDS, alpha=0.35, linewidth=0)
    beside.set_ylim(0.0, 1.0)
    beside.set_ylabel("probability", color=_QUIET)
    ax.set_zorder(beside.get_zorder() + 1)  # the line in front of the area
    ax.patch.set_visible(False)
    _title(ax, presentation.plain(presentation.target_sentence(trace, target)))
    return _figure(ax)


def head_map(trace: Trace, position: int | None) -> HeatMap:
    """Return what each head adds to the target's logit, by layer and head.

    Raises:
        ValueError: The trace has no heads with contributions at this position.
    """
    at = trace.target(position).position
    values = np.full((len(trace.layers), trace.header.sizes.n_heads), np.nan)
    for row, layer in enumerate(trace.layers):
        for part in layer.parts_of_kind(NodeKind.HEAD_OUTPUT, at):
            if part.node.head is not None and part.logit_contribution is not None:
                values[row, part.node.head] = part.logit_contribution
    if np.isnan(values).all():
        raise ValueError(
            "the trace has no heads with contributions; request it with logit_contribution=True "
            "and with node_kinds that include HEAD_OUTPUT and ATTENTION_CONCAT"
        )
    return HeatMap(
        title=f"What heads add to the {trace.explained(position)}",
        row_axis="layer",
        rows=tuple(str(layer.layer) for layer in trace.layers),
        column_axis="head",
        columns=tuple(map(str, range(values.shape[1]))),
        values=values,
    )


# ---- Heat maps --------------------------------------------------------------------------------


@figure_of.register(HeatMap)
def heat_map_figure(found: HeatMap, ax: Axes | None, *, signed: bool = False) -> Figure:
    """Draw a heat map; `signed` = in the colours of contributions instead of changes."""
    ends = (_SUBTRACTS, "#ffffff", _HEAD_ADDS) if signed else _CHANGES
    largest = found.largest or 1.0
    values = found.values
    rows = found.rows
    if found.row_axis == "layer":  # as on the pages, the last layer is on top
        values, rows = values[::-1], rows[::-1]
    texts = [
        ["" if np.isnan(v) else presentation.signed(v, found.digits) for v in row] for row in values
    ]
    return _grid(
        ax,
        (values, rows, found.columns, texts),
        (_colours("changes", ends), _scale(-largest, largest, linear=signed)),
        (found.title, found.row_axis, found.column_axis),
    )


_CHANGES = ("#205c9c", "#f7f6f3", "#ac3e1c")
_NORMS = ("#f5ecde", "#f4c7a0", "#e7937c", "#b55378", "#5e2a68")


@figure_of.register(Gradient)
def gradient_figure(gradient: Gradient, ax: Axes | None, *, kind: MatrixKind | None) -> Figure:
    """Draw the norms of one kind of matrix; `Gradient.figure` documents the arguments."""
    kinds = list(dict.fromkeys(matrix.kind for matrix in gradient.matrices))
    shifted = [found.kind for found in gradient.matrices if found.projected_side is Side.VJP]
    chosen = kind or next(iter(shifted or kinds), None)
    matrices = gradient.of_kind(chosen) if chosen in kinds else ()
    if not matrices:
        known = ", ".join(kinds) or "none"
        raise ValueError(f"the gradient has no matrices of kind {kind}; expected one of {known}")
    layers = sorted({matrix.layer for matrix in matrices}, reverse=True)
    shape = (len(layers), len(gradient.prompt_tokens))
    values: NDArray[np.float64] = np.full(shape, np.nan)
    texts = [[""] * shape[1] for _ in layers]
    for matrix in matrices:
        row = layers.index(matrix.layer)
        for component in matrix.components:
            if component.size == 0 or component.vjp_norm <= np.nan_to_num(
                values[row, component.position]
            ):
                continue  # of several experts, the largest is shown
            values[row, component.position] = component.vjp_norm
            read = component.projection.top_tokens if component.projection else ()
            tokens = read if matrix.projected_side is Side.INPUT else component.promoted
            texts[row][component.position] = str(tokens[0]) if tokens else ""
    what = "top token of x" if matrices[0].projected_side is Side.INPUT else "most promoted token"
    norms = ((position, float(norm)) for (_, position), norm in np.ndenumerate(values))
    largest, beyond = presentation.norm_limit(norms, gradient.prompt_tokens)
    note = f" ({beyond})" if beyond else ""
    columns = [
        presentation.token_at(position, gradient.prompt_tokens) for position in range(shape[1])
    ]
    return _grid(
        ax,
        (values, [str(layer) for layer in layers], columns, texts),
        (_colours("norms", _NORMS), _scale(0.0, largest or 1.0)),
        (f"{chosen}: |δ|{note}, and the {what}", "layer", ""),
    )


def _grid(
    ax: Axes | None,
    shown: tuple[NDArray[np.float64], Sequence[str], Sequence[str], Sequence[Sequence[str]]],
    scale: tuple[Colormap, Normalize],
    titles: tuple[str, str, str],
) -> Figure:
    """Draw values `[rows, columns]` with labels and texts; NaN stays blank."""
    values, rows, columns, texts = shown
    wide = min(10.0, max(3.4, 1.4 + 0.75 * len(columns)))
    ax = _axes(ax, (wide, 1.3 + _ROW * len(rows)))
    image = ax.imshow(np.ma.masked_invalid(values), cmap=scale[0], norm=scale[1], aspect="auto")
    _figure(ax).colorbar(image, ax=ax)
    every = math.ceil(len(columns) / 40)
    places = list(range(0, len(columns), every))
    ax.set_xticks(
        places,
        [_directed(columns[place]) for place in places],
        parse_math=False,
        fontsize="small",
        rotation=45 if max(map(len, columns), default=0) > 4 else 0,
        ha="right" if max(map(len, columns), default=0) > 4 else "center",
    )
    ax.set_yticks(range(len(rows)), rows, parse_math=False, fontsize="small")
    ax.set_xlabel(titles[2])
    ax.set_ylabel(titles[1])
    _title(ax, titles[0])
    if len(columns) <= _LABELLED:
        for row, line in enumerate(texts):
            for column, text in enumerate(line):
                if text:
                    colour = scale[0](scale[1](values[row, column]))
                    _cell(ax, row, column, text, colour)
    return _figure(ax)


_CELL = 9  # characters


def _cell(ax: Axes, row: int, column: int, text: str, colour: Any) -> None:
    red, green, blue = (round(255 * part) for part in colour[:3])
    ink = presentation.ink_on((red, green, blue))
    shown = text if len(text) <= _CELL else f"{text[: _CELL - 1]}…"
    ax.text(
        column,
        row,
        _directed(shown),
        ha="center",
        va="center",
        fontsize="x-small",
        color=tuple(part / 255 for part in ink),
        parse_math=False,
        clip_on=True,
    )


# ---- Scales and texts -------------------------------------------------------------------------


def _colours(name: str, stops: Sequence[str]) -> Colormap:
    colors = require("matplotlib.colors", "figures", "a figure")
    made: Colormap = colors.LinearSegmentedColormap.from_list(name, list(stops))
    return made


def _scale(least: float, largest: float, *, linear: bool = False) -> Normalize:
    """A linear or a square-root scale, as on the pages; that of -v is that of v, negated."""
    colors = require("matplotlib.colors", "figures", "a figure")
    if linear:
        plain: Normalize = colors.Normalize(least, largest)
        return plain
    made: Normalize = colors.FuncNorm(
        (lambda v: np.sign(v) * np.sqrt(np.abs(v)), lambda v: np.sign(v) * np.square(v)),
        vmin=least,
        vmax=largest,
    )
    return made


def _title(ax: Axes, text: str) -> None:
    ax.set_title(_directed(text), loc="left", fontsize="medium", parse_math=False, wrap=True)


_RIGHT_TO_LEFT = "\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff"
_RUN = re.compile(f"␣?[{_RIGHT_TO_LEFT}](?:[{_RIGHT_TO_LEFT}\\s\\d]*[{_RIGHT_TO_LEFT}\\d])?")


def _directed(text: str) -> str:
    """Isolate words that are written from right to left, which do not reorder the text around them.

    Before 3.11, matplotlib ignores directions and draws the control characters.
    """
    if require("matplotlib", "figures", "a figure").__version_info__ < (3, 11):
        return text
    isolated = _RUN.sub("\u2067\\g<0>\u2069", text)
    return text if isolated == text else f"\u200e{isolated}"


def _clean(ax: Axes) -> None:
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
