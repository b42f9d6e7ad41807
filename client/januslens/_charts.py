"""Draw figures as SVG: rectangles, lines, texts, and charts of curves over a common axis.

Unlike `_figures.py`, this needs no library: reports and the documentation embed the SVG, and equal
data gives equal text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

_XMLNS = "http://www.w3.org/2000/svg"
# Estimated pixels per character.
_CHARACTER = 6.2


class Drawing:
    """An SVG figure of panels beside and below each other; it grows with what is drawn."""

    def __init__(self) -> None:
        self._parts: list[Element] = []
        self._width = self._height = 0.0

    def rectangle(
        self, x: float, y: float, size: tuple[float, float], colour: str, title: str = ""
    ) -> None:
        """Draw a filled rectangle; browsers show its title under the pointer."""
        width, height = size
        drawn = self._add(
            "rect", x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=f"{height:.1f}",
            fill=colour,
        )  # fmt: skip
        if title:
            SubElement(drawn, "title").text = title
        self._reach(x + width, y + height)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "start",
        bold: bool = False,
        turned: bool = False,
        colour: str = "#222",
    ) -> None:
        """Write a line of text; turned texts run downwards from the point."""
        drawn = self._add(
            "text", x=f"{x:.1f}", y=f"{y:.1f}", **{"text-anchor": anchor}, fill=colour
        )
        drawn.text = text
        if bold:
            drawn.set("font-weight", "600")
        if turned:
            drawn.set("transform", f"rotate(55 {x:.1f} {y:.1f})")
        length = _CHARACTER * len(text)
        along = 0.6 * length if turned else length if anchor == "start" else 0
        self._reach(x + along, y + (0.85 * length if turned else 4))

    def line(self, points: Iterable[tuple[float, float]], colour: str, dashes: str = "") -> None:
        """Draw a line through points."""
        through = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        drawn = self._add("polyline", points=through, fill="none", stroke=colour)
        drawn.set("stroke-width", "1.8")
        if dashes:
            drawn.set("stroke-dasharray", dashes)

    def _add(self, tag: str, **attributes: str) -> Element:
        part = Element(tag, attributes)
        self._parts.append(part)
        return part

    def _reach(self, x: float, y: float) -> None:
        self._width, self._height = max(self._width, x), max(self._height, y)

    def element(self, described: str) -> Element:
        """Return the whole figure as an SVG element; `described` is its title."""
        width, height = f"{self._width + 14:.0f}", f"{self._height + 12:.0f}"
        whole = Element(
            "svg",
            {
                "xmlns": _XMLNS,
                "viewBox": f"0 0 {width} {height}",
                "width": width,
                "height": height,
                "role": "img",
                "font-family": "system-ui, sans-serif",
                "font-size": "11",
            },
        )
        SubElement(whole, "title").text = described
        SubElement(whole, "rect", {"width": width, "height": height, "fill": "#fff"})
        whole.extend(self._parts)
        return whole


def svg(figure: Element) -> str:
    """Return a figure as the text of an SVG file."""
    return tostring(figure, encoding="unicode") + "\n"


@dataclass(frozen=True)
class Curve:
    """A line of a chart; NaN leaves a gap."""

    name: str
    values: Sequence[float]
    colour: str
    dashes: str = ""


# Colours and dashes that remain distinct in grey and for colour-blind readers.
STYLES = (
    ("#205c9c", ""),
    ("#ac3e1c", "5 3"),
    ("#3c7a3c", "2 2"),
    ("#7a4c9c", "8 2 2 2"),
    ("#8a6d1f", "1 3"),
)


def styled(values: Iterable[tuple[str, Sequence[float]]]) -> list[Curve]:
    """Return named curves, each in a style of its own."""
    return [
        Curve(name, found, *STYLES[number % len(STYLES)])
        for number, (name, found) in enumerate(values)
    ]


CHART = (200.0, 110.0)


def chart(
    drawing: Drawing,
    x: float,
    y: float,
    title: str,
    positions: Sequence[float],
    curves: Sequence[Curve],
    ends: tuple[float, float],
    axis: str,
) -> None:
    """Draw curves over a common axis; `ends` are the smallest and largest value shown."""
    left, top = x + 26, y + 10
    width, height = CHART

    def place(at: float, value: float) -> tuple[float, float]:
        low, high = ends
        share = (at - positions[0]) / ((positions[-1] - positions[0]) or 1)
        clipped = min(max(value, low), high)
        return left + share * width, top + (high - clipped) / (high - low) * height

    drawing.text(x, y, title, bold=True)
    drawing.rectangle(left, top, CHART, "#f7f6f3")
    for value in (ends[0], (ends[0] + ends[1]) / 2, ends[1]):
        across = [place(positions[0], value), (left + width, place(positions[0], value)[1])]
        drawing.line(across, "#ccc")
        drawing.text(left - 4, across[0][1] + 4, f"{value:g}", anchor="end")
    for at in dict.fromkeys((positions[0], positions[-1])):
        drawing.text(place(at, 0)[0], top + height + 14, f"{at:g}", anchor="middle")
    drawing.text(left + width / 2, top + height + 14, axis, anchor="middle")
    for curve in curves:
        known = zip(positions, curve.values, strict=True)
        drawn = [place(at, value) for at, value in known if math.isfinite(value)]
        if len(drawn) == 1:  # a line of one point is invisible
            drawn.append((drawn[0][0] + 3, drawn[0][1]))
        drawing.line(drawn, curve.colour, curve.dashes)


def legend(drawing: Drawing, x: float, y: float, curves: Sequence[Curve]) -> None:
    """Name the curves in a row."""
    for curve in curves:
        drawing.line([(x, y - 4), (x + 22, y - 4)], curve.colour, curve.dashes)
        drawing.text(x + 28, y, curve.name)
        x += 50 + 6.4 * len(curve.name)


def ceiling(values: Iterable[float]) -> float:
    """Return a round number of at least the largest finite value, for the end of an axis."""
    largest = max((value for value in values if math.isfinite(value)), default=0.0)
    if largest <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(largest))
    return next(unit * step for step in (1, 2, 4, 5, 8, 10) if unit * step >= largest * 0.999)
