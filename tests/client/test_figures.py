"""Figures that matplotlib draws: the numbers of their bars, lines and images."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt

import januslens
from januslens import Client, Gradient, Trace

PROMPT = "The capital of Japan is the city of"
mpl.use("agg")


@pytest.fixture(scope="module")
def client(server_address: str) -> Iterator[Client]:
    with Client(server_address) as client:
        yield client


@pytest.fixture(scope="module")
def trace(client: Client) -> Trace:
    return client.trace(PROMPT)


@pytest.fixture(scope="module")
def gradient(client: Client) -> Gradient:
    return client.gradient_lens(PROMPT, " Paris", matrices=["ff1", "ff2"])


def axes(figure: Any) -> list[Any]:
    """Return the axes; the types of matplotlib's artists do not tell what they hold."""
    return list(figure.axes)


def pixels(figure: Any) -> np.ndarray[Any, Any]:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="rgba")
    return np.frombuffer(drawn.getvalue(), np.uint8)


def test_filled_bars_of_the_tree_add_up_to_the_logit(trace: Trace) -> None:
    (ax,) = axes(trace.figure())
    filled = [bar.get_width() for bar in ax.patches if bar.get_facecolor()[3] > 0]
    logit = trace.targets[-1].target_logit
    assert math.fsum(filled) == pytest.approx(logit, abs=1e-3)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert len(names) == len(ax.patches)
    tree = trace.why(at_most=10)
    bars = dict(zip((name.strip() for name in names), ax.patches, strict=True))
    for part in tree.parts:
        place = f"L{part.node.layer} {'attention' if 'ATTENTION' in part.node.kind else 'MLP'}"
        assert bars[f"{place}'s result"].get_width() == part.contribution


def test_lens_has_the_rank_and_probability_after_every_step(trace: Trace) -> None:
    ax, beside = axes(trace.figure("lens"))
    steps = [
        node.projection
        for layer in trace.layers
        for kind in ("RESIDUAL_MID", "BLOCK_OUTPUT")
        for node in layer.nodes_of(kind, 7)
        if node.layer == layer.layer
    ]
    (line,) = ax.lines
    places, ranks = line.get_data()
    assert list(places) == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]
    assert all(float(tick).is_integer() for tick in ax.get_xticks())
    assert [rank - 1 for rank in ranks[1:]] == [read.target_rank for read in steps if read]
    (area,) = beside.collections
    top = area.get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(max(read.target_probability or 0 for read in steps if read))


def test_heads_are_an_image_with_the_last_layer_on_top(trace: Trace) -> None:
    (image,) = axes(trace.figure("heads"))[0].images
    shown = np.asarray(image.get_array())
    assert shown.shape == (4, 4)
    for edge in trace.edge_list:
        node = trace.node(edge.source)
        if node.kind == "HEAD_OUTPUT" and edge.logit_contribution is not None:
            assert node.layer is not None
            assert node.head is not None
            assert shown[3 - node.layer, node.head] == pytest.approx(edge.logit_contribution)
    low, high = image.get_clim()
    assert high == -low == np.abs(shown).max()


def test_gradient_has_norms_and_promoted_tokens(gradient: Gradient) -> None:
    ax = axes(gradient.figure("FF2"))[0]
    (image,) = ax.images
    shown = np.ma.getdata(image.get_array())
    texts = {text.get_position(): text.get_text() for text in ax.texts}
    for matrix in gradient.of_kind(januslens.MatrixKind.FF2):
        for part in matrix.components:
            place = (part.position, 3 - matrix.layer)
            if part.size == 0:
                assert place not in texts
            else:
                assert shown[place[::-1]] == pytest.approx(part.vjp_norm)
                assert (
                    texts[place].rstrip("…")
                    == str(part.promoted[0])[: 8 if "…" in texts[place] else 9]
                )


def test_one_position_with_far_larger_norms_does_not_set_the_scale(gradient: Gradient) -> None:
    lines = [json.loads(line) for line in gradient.to_json_lines()]
    for matrix in (line["matrix"] for line in lines if "matrix" in line):
        for part in matrix["components"]:
            if part.get("position", 0) == 1:
                part["vjpNorm"] = 1e3 * part.get("vjpNorm", 0)
    scaled = januslens.read_gradient(map(json.dumps, lines))
    norms = [
        part.vjp_norm
        for matrix in scaled.of_kind(januslens.MatrixKind.FF2)
        for part in matrix.components
        if part.position != 1
    ]
    ax = axes(scaled.figure("FF2"))[0]
    assert ax.images[0].get_clim() == pytest.approx((0, max(norms)))
    assert "␣capital (1) up to " in ax.get_title("left")
    assert ", ␣capital (1) up to " in scaled._repr_html_()
    assert "up to" not in axes(gradient.figure("FF2"))[0].get_title("left")


def test_texts_are_not_read_as_formulas_and_axes_can_be_given(trace: Trace, tmp_path: Path) -> None:
    found = januslens.HeatMap(
        "costs $x$", "layer", ("0",), "token", ("$\\frac$", "a_b^c"), np.array([[1.0, -2.0]])
    )
    figure = plt.subplots(1, 2)[0]
    left, right = axes(figure)
    try:
        assert found.figure(ax=left) is figure
        assert trace.figure("heads", ax=right) is figure
        figure.savefig(tmp_path / "figure.png")
    finally:
        plt.close(figure)
    (image,) = left.images
    assert np.asarray(image.get_array()).tolist() == [[1.0, -2.0]]
    assert plt.get_fignums() == []


@pytest.mark.skipif(mpl.__version_info__ < (3, 11), reason="matplotlib ignores directions")
def test_words_from_right_to_left_do_not_reorder_a_title() -> None:
    found = januslens.HeatMap(
        "logit of ␣שלם: +5.28 (3)", "layer", ("0",), "token", ("a",), np.ones((1, 1))
    )
    figure = found.figure()
    figure.set_layout_engine("none")  # which moves the axes with every drawing
    drawn = pixels(figure)
    # An override sets the order of the letters as they are seen, from left to right.
    axes(figure)[0].set_title("logit of \u202dםלש␣\u202c: +5.28 (3)", loc="left", fontsize="medium")
    assert np.array_equal(drawn, pixels(figure))


def test_unknown_figures_are_refused(trace: Trace, gradient: Gradient) -> None:
    with pytest.raises(
        ValueError, match="unknown figure 'tree'; expected 'why', 'lens' or 'heads'"
    ):
        trace.figure("tree")  # type: ignore[arg-type] # as a user could
    with pytest.raises(ValueError, match="no matrices of kind Q; expected one of FF1, FF2"):
        gradient.figure("Q")
