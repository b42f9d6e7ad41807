"""HTML as a tree of elements, so that whatever a model says stays text."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import TypeAlias
from xml.etree.ElementTree import Element, tostring

Child: TypeAlias = "Element | str"

# Colours come from the notebook's own theme; only heat-map cells bring ground and ink of their own.
# Notebooks have styles for tables; the class twice outweighs them.
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
.januslens .d{opacity:.65}
.januslens .t{font-weight:700;text-decoration:underline;text-underline-offset:2px}
.januslens.januslens .m td.h{border:1px solid rgba(128,128,128,.35);padding:1px 5px;max-width:9em;
overflow:hidden;text-overflow:ellipsis}
.januslens .b{display:inline-block;height:8px;background:#3d86bd;border-radius:1px}
"""


def element(tag: str, *children: Child, classes: str = "", **attributes: str) -> Element:
    """An element with its children in order, texts among them."""
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
    """The HTML that a notebook shows."""
    whole = element("div", element("style", _STYLE), *children, classes="januslens")
    return tostring(whole, encoding="unicode", method="html")


def table(caption: str, headings: Iterable[str], rows: Iterable[Iterable[Child]]) -> Element:
    """A table; a heading that starts with `>` belongs to a column of numbers."""
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
    """Text of the user's or the model's own, kept from turning what stands around it."""
    shown = "".join(char if unicodedata.category(char)[0] != "C" else " " for char in text)
    return element("bdi", shown, classes=classes)


def note(text: str) -> Element:
    """What the columns above mean."""
    return element("p", text, classes="d")
