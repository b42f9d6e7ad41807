"""Tokens, ranks, numbers and heat-map cells."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

from januslens._notebook.elements import Child, element, literal

if TYPE_CHECKING:
    from januslens._results.tokens import Token

# By rank of the target, 0 being the top: first, among ten, a hundred, a thousand, beyond.
_RANKS = ((0, "#0b4f8a"), (9, "#3d86bd"), (99, "#8fbede"), (999, "#d3e5f2"))
_BEYOND = "#f1f1ef"
# By a norm's part of the largest one.
_NORMS = ((245, 236, 222), (244, 199, 160), (231, 147, 124), (181, 83, 120), (94, 42, 104))
_INK, _LIGHT_INK = "#000000", "#ffffff"
_BAR = 90


def tokens(found: Iterable[Token], sought: Collection[Token] = ()) -> Element:
    """Several tokens, those that are sought emphasised."""
    ids = {token.id for token in sought}
    shown: list[Child] = []
    for token in found:
        shown += [literal(str(token), "t" if token.id in ids else ""), "  "]
    return element("span", *shown[:-1])


def rank(value: float | None) -> str:
    """A rank, 0 being the top; a mean of ranks is rounded."""
    return "" if value is None else f"{value:.0f}"


def probability(value: float | None) -> str:
    """A probability with as many digits as tell it from 0 and from 1."""
    if value is None:
        return ""
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"


def probability_bar(value: float | None) -> Child:
    """A probability and a bar as long as it."""
    if value is None:
        return ""
    bar = element("span", classes="b", style=f"width:{round(value * _BAR)}px")
    return element("span", f"{probability(value)} ", bar)


def signed(value: float | None) -> str:
    """A number that adds or subtracts."""
    return "" if value is None else f"{value:+.2f}"


def size(value: float) -> str:
    """A norm: three digits, whatever its magnitude."""
    return f"{value:.3g}"


def percent(share: float | None) -> str:
    """A signed share of a sum."""
    # Adding zero turns a rounded -0 into 0.
    return "" if share is None else f"{round(100 * share) + 0} %"


def rank_cell(lines: Sequence[Child], value: int | None) -> Element:
    """A heat-map cell in the colour of a rank's bin."""
    if value is None:
        return element("td", *lines, classes="h")
    colour = next((colour for limit, colour in _RANKS if value <= limit), _BEYOND)
    return _painted(lines, tuple(bytes.fromhex(colour[1:])))


def norm_cell(lines: Sequence[Child], value: float, largest: float) -> Element:
    """A heat-map cell on a square-root scale from nothing to the largest norm."""
    part = math.sqrt(value / largest) * (len(_NORMS) - 1) if largest > 0 else 0.0
    below = min(int(part), len(_NORMS) - 2)
    pairs = zip(_NORMS[below], _NORMS[below + 1], strict=True)
    return _painted(lines, tuple(round(a + (b - a) * (part - below)) for a, b in pairs))


def _painted(lines: Sequence[Child], colour: tuple[int, ...]) -> Element:
    ground = "#" + bytes(colour).hex()
    style = f"background:{ground};color:{_ink(colour)}"
    broken: list[Child] = [piece for line in lines for piece in (line, element("br"))]
    return element("td", *broken[:-1], classes="h", style=style)


def _ink(colour: tuple[int, ...]) -> str:
    """Black or white, whichever has more contrast (WCAG 2.2, relative luminance)."""
    red, green, blue = (_linear(part / 255) for part in colour)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return _INK if (luminance + 0.05) ** 2 > 1.05 * 0.05 else _LIGHT_INK


def _linear(part: float) -> float:
    return part / 12.92 if part <= 0.04045 else float(((part + 0.055) / 1.055) ** 2.4)
