"""HTML for notebooks: elements, tables, cells and frames."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, TypeAlias
from xml.etree.ElementTree import Element, tostring

from januslens import _presentation as presentation

if TYPE_CHECKING:
    from januslens.results.models import Provenance
    from januslens.results.tokens import Token


Child: TypeAlias = "Element | str"

# Colours come from the notebook's theme, except those of heat-map cells. The class name is repeated
# in the selectors so that they take precedence over the notebook's own styles for tables.
_STYLE = """
.januslens{font:13px/1.45 system-ui,sans-serif;max-width:100%;overflow-x:auto}
.januslens p{margin:2px 0}
.januslens.januslens table{border-collapse:collapse;margin:6px 0 2px;font:inherit;table-layout:auto}
.januslens.januslens caption{text-align:left;font-weight:600;padding:2px 0;color:inherit}
.januslens.januslens tr{background:none}
.januslens.januslens :is(th,td){padding:1px 9px 1px 0;text-align:left;white-space:nowrap;border:0;
background:none;font-weight:normal;max-width:none}
.januslens.januslens th{opacity:.65;vertical-align:bottom}
.januslens.januslens .n{text-align:right;font-variant-numeric:tabular-nums}
.januslens bdi{font:12px ui-monospace,monospace;unicode-bidi:isolate}
.januslens code{font:12px ui-monospace,monospace;background:rgba(128,128,128,.14);border-radius:3px;
padding:0 3px}
.januslens .d{opacity:.65}
.januslens .t{font-weight:700;text-decoration:underline;text-underline-offset:2px}
.januslens.januslens .m td.h{border:1px solid rgba(128,128,128,.35);padding:1px 5px;max-width:9em;
overflow:hidden;text-overflow:ellipsis}
.januslens .b{display:inline-block;height:8px;background:#3d86bd;border-radius:1px}
"""


def element(tag: str, *children: Child, classes: str = "", **attributes: str) -> Element:
    """Build an element. Its children are elements and texts, in order."""
    made = Element(tag, {"class": classes} if classes else {}, **attributes)
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + child
        else:
            made.text = (made.text or "") + child
    return made


def document(*children: Child) -> str:
    """Build the HTML that a notebook shows."""
    whole = element("div", element("style", _STYLE), *children, classes="januslens")
    return tostring(whole, encoding="unicode", method="html")


def file(title: str, body: str) -> str:
    """Build an HTML file around a `document`; it runs no script and loads nothing."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def table(caption: str, headings: Iterable[str], rows: Iterable[Iterable[Child]]) -> Element:
    """Build a table. The columns of headings that start with `>` are right-aligned."""
    headings = list(headings)
    classes = ["n" if heading.startswith(">") else "" for heading in headings]
    head = (
        element("th", heading.removeprefix(">"), classes=kind)
        for heading, kind in zip(headings, classes, strict=True)
    )
    body = (
        element("tr", *(_cell(child, kind) for child, kind in zip(row, classes, strict=True)))
        for row in rows
    )
    return element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *head)),
        element("tbody", *body),
    )


def _cell(child: Child, kind: str) -> Element:
    if isinstance(child, Element) and child.tag == "td":
        return child
    return element("td", child, classes=kind)


def literal(text: str, classes: str = "") -> Element:
    """Text from the user or the model, with its writing direction isolated."""
    shown = "".join(char if unicodedata.category(char)[0] != "C" else " " for char in text)
    return element("bdi", shown, classes=classes)


def note(text: str) -> Element:
    """A note below a table, which explains its columns; `names` in backticks are code."""
    return element("p", *_with_code(text), classes="d")


def warning(text: str) -> Element:
    """A line about what a table leaves out; `names` in backticks are code."""
    return element("p", element("b", "Left out: "), *_with_code(text))


def _with_code(text: str) -> list[Child]:
    pieces = text.split("`")
    return [element("code", piece) if i % 2 else piece for i, piece in enumerate(pieces)]


# Background colour by the bin of the target's rank.
_RANK_COLOURS: dict[str, presentation.Rgb] = {
    "top": (11, 79, 138),
    "< 10": (61, 134, 189),
    "< 100": (143, 190, 222),
    "< 1k": (211, 229, 242),
    "middle": (241, 241, 239),
    "last 1k": (246, 218, 204),
    "last 100": (226, 146, 118),
}
_BAR = 90


def tokens(found: Iterable[Token], sought: Collection[Token] = ()) -> Element:
    """Tokens in a row; those in `sought` are emphasised."""
    ids = {token.id for token in sought}
    shown: list[Child] = []
    for token in found:
        shown += [literal(str(token), "t" if token.id in ids else ""), "  "]
    return element("span", *shown[:-1])


def rank(value: float | None) -> str:
    """A rank, rounded if it is a mean of ranks; empty without one."""
    return "" if value is None else f"{value:.0f}"


def probability_bar(value: float | None, logarithm: float | None = None) -> Child:
    """A probability with a bar of proportional length; empty without one."""
    if value is None:
        return ""
    bar = element("span", classes="b", style=f"width:{round(value * _BAR)}px")
    return element("span", f"{presentation.probability(value, logarithm)} ", bar)


def signed(value: float | None) -> str:
    """A number with its sign; empty without one."""
    return "" if value is None else presentation.signed(value)


def percent(share: float | None) -> str:
    """A share of a sum in percent, with its sign; empty without one."""
    return "" if share is None else presentation.percent(share)


def rank_cell(lines: Sequence[Child], value: int | None, vocabulary: int) -> Element:
    """A heat-map cell, coloured by the bin of a rank."""
    if value is None:
        return element("td", *lines, classes="h")
    return _coloured(lines, _RANK_COLOURS[presentation.rank_bin(value, vocabulary or None)])


def norm_cell(lines: Sequence[Child], value: float, largest: float) -> Element:
    """A heat-map cell, coloured on a square-root scale from 0 to the largest norm."""
    return _coloured(lines, presentation.norm_colour(value, largest))


def change_cell(value: float, largest: float, digits: int = 2) -> Element:
    """A heat-map cell with a change: blue for decreases, red for increases; empty for NaN."""
    if math.isnan(value):
        return element("td", classes="h")
    colour = presentation.change_colour(value, largest)
    return _coloured([presentation.signed(value, digits)], colour)


def _coloured(lines: Sequence[Child], colour: presentation.Rgb) -> Element:
    ink = presentation.ink_on(colour)
    style = f"background:#{bytes(colour).hex()};color:#{bytes(ink).hex()}"
    broken: list[Child] = [piece for line in lines for piece in (line, element("br"))]
    return element("td", *broken[:-1], classes="h", style=style)


def heading(kind: str, prompt: Sequence[Token], provenance: Provenance) -> Element:
    """A heading with the name of the result, the tokens of the prompt, and the model."""
    return element(
        "div",
        element("p", element("b", f"{kind} "), tokens(prompt)),
        element("p", presentation.model_name(provenance), classes="d"),
    )


def cut(complete: bool) -> list[Element]:
    """A line that marks the result as incomplete; nothing if it is complete."""
    return (
        []
        if complete
        else [element("p", element("b", "Incomplete: the stream ended before its summary."))]
    )


def sentence(parts: presentation.Sentence, emphasised: Collection[Token] = ()) -> Element:
    """A sentence of texts and tokens; the tokens in `emphasised` are emphasised."""
    children = [part if isinstance(part, str) else tokens([part], emphasised) for part in parts]
    return element("p", *children)
