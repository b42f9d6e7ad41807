"""Displays of results in a notebook: correct numbers, and texts of models without markup."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

import januslens
from januslens import Client, Gradient, Trace
from januslens import _html as cells
from tests.client.messages import trace_stream
from tests.client.scripted import Script, serving

PROMPT = "The capital of Japan is the city of"
VOID = {"br"}


class Read(HTMLParser):
    """Parses HTML: rows of tables as texts, all tags, and whether they were closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def read(result: Any) -> Read:
    return Read(result._repr_html_())


@pytest.fixture(scope="module")
def client(server_address: str) -> Iterator[Client]:
    with Client(server_address, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def trace(client: Client) -> Trace:
    return client.trace(PROMPT)


@pytest.fixture(scope="module")
def gradient(client: Client) -> Gradient:
    return client.gradient_lens(PROMPT, " Paris", components=0)


def test_a_trace_shows_how_its_target_emerges(trace: Trace) -> None:
    rows = read(trace).rows
    last = trace.layers[-1].nodes_of("BLOCK_OUTPUT")[-1].projection
    assert last is not None
    tops = "  ".join(str(token) for token in last.top_tokens[:3])
    (row,) = [row for row in rows if row[2:3] == [tops] and row[1] == "+ MLP"]
    assert row[3] == str(last.target_rank)
    assert row[4].split()[0] == f"{last.target_probability:.3f}"


def test_a_trace_shows_what_adds_most(trace: Trace) -> None:
    best = trace.contributions()[0]
    assert ["logit", "node", "top tokens"] in read(trace).rows
    assert f"{best.logit_contribution:+.2f}" in [row[0] for row in read(trace).rows]


def test_positions_are_a_heat_map(client: Client) -> None:
    trace = client.trace(PROMPT, positions="all")
    rows = [row for row in read(trace).rows if len(row) == len(trace.prompt_tokens) + 1]
    assert [row[0] for row in rows] == ["layer", "3", "2", "1", "0"]
    for row, layer in zip(rows[1:], reversed(trace.layers), strict=True):
        outputs = [n.projection for n in layer.nodes_of("BLOCK_OUTPUT") if n.layer == layer.layer]
        assert row[1:] == [str(read.top_tokens[0]) for read in outputs if read]


def test_a_gradient_shows_both_pictures(gradient: Gradient) -> None:
    rows = [row for row in read(gradient).rows if len(row) == len(gradient.prompt_tokens) + 1]
    assert [row[0] for row in rows] == ["layer", "3", "2", "1", "0"] * 2
    for layer in range(4):
        (imprint, shift) = [row for row in rows if row[0] == str(layer)]
        for part in gradient.matrix(layer, "FF1").components:
            if part.size and part.projection:
                assert imprint[part.position + 1] == str(part.projection.top_tokens[0])
        for part in gradient.matrix(layer, "FF2").components:
            if part.size:
                assert part.projection
                top, bottom = part.projection.top_tokens[0], part.projection.bottom_tokens[0]
                # A descent step subtracts δ, so it promotes the bottom of the ranking.
                assert shift[part.position + 1] == f"↑ {bottom}↓ {top}"


def test_a_matrix_lists_its_components(gradient: Gradient) -> None:
    matrix = gradient.matrix(3, "FF2")
    row = read(matrix).rows[1]
    part = matrix.components[0]
    assert row[:4] == [str(part.position)] + [
        f"{norm:.3g}" for norm in (part.input_norm, part.vjp_norm, part.size)
    ]


def test_a_preview_shows_before_and_after(client: Client) -> None:
    shift = januslens.ForwardShift(3, eta=0.15)
    probes = [januslens.Probe(PROMPT, label="<script>alert(1)</script>\u202e")]
    preview = client.preview_edit(PROMPT, " Paris", shift, probes=probes)
    seen = read(preview)
    assert seen.rows[1][5] == "␣Tokyo → ␣Paris"
    assert seen.rows[1][4] == f"{preview.edited.rank_before} → 0"
    assert seen.rows[2][0] == "<script>alert(1)</script> "
    assert "script" not in seen.tags


def test_lists_have_html_displays(client: Client, trace: Trace) -> None:
    (model,) = read(client.list_models()).rows[1:]
    assert model[:3] == ["demo", "READY", "GPT2LMHeadModel"]
    tokens = read(client.tokenize("<b> Japan")).rows
    assert [row[2] for row in tokens[1:]] == [str(t) for t in client.tokenize("<b> Japan")]
    found = client.find_neurons(" Tokyo", limit=3)
    assert len(read(found).rows) == 4
    projections = client.project([[1.0] * 128] * 2, target=" Tokyo")
    assert len(read(projections).rows) == 3
    layer = read(trace.layer(3)).rows
    assert [row for row in layer if row[2:3] == ["L3 head 2 output"]]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),
        ('"><img src=x onerror=alert(1)>', '"><img␣src=x␣onerror=alert(1)>'),
        ("&lt;", "&lt;"),
        ("\u202eevil", "<U+202E>evil"),
        ("a\u200bb", "a<U+200B>b"),
        ("\x00\n", "<U+0000>⏎"),
    ],
)
def test_hostile_tokens_are_text(text: str, shown: str) -> None:
    responses = trace_stream()
    for token in responses[0].header.prompt_tokens:
        token.text = text
    with serving(Script(responses)) as address, Client(address) as client:
        trace = client.trace(PROMPT)
    seen = read(trace)
    assert shown in Whole(trace._repr_html_()).text
    assert seen.tags <= {"div", "style", "p", "b", "bdi", "span", "table", "caption"} | {
        "thead", "tbody", "tr", "th", "td", "br",
    }  # fmt: skip


class Whole(HTMLParser):
    """Collects all text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.feed(html)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_text_has_contrast_on_every_background() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    painted = [cells.norm_cell([], i / 100, 1.0) for i in range(101)]
    painted += [cells.rank_cell([], rank, 50000) for rank in (0, 5, 50, 500, 5000, 49500, 49990)]
    for cell in painted:
        ground, ink = (part.split(":")[1] for part in cell.attrib["style"].split(";"))
        low, high = sorted((luminance(ground), luminance(ink)))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_repr_of_results_is_one_line(trace: Trace, gradient: Gradient) -> None:
    assert repr(trace) == (
        f"<Trace of {PROMPT!r} at 7: 4 layers, {len(trace.node_list)} nodes, "
        f"{len(trace.edge_list)} edges>"
    )
    assert repr(gradient).startswith(f"<Gradient on {PROMPT!r}: loss 13.")
    assert repr(trace.layer(1)).startswith("<LayerGraph of layer 1: ")
    assert repr(gradient.matrix(3, "FF2")) == "<Matrix L3.FF2 [512, 128]: 8 of 8 components>"
