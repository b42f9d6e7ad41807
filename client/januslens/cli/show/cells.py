"""Tokens, ranks and numbers as table cells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.text import Text

from januslens._results.tokens import Token

_LEVELS = " ▁▂▃▄▅▆▇█"
# First, among the first ten, hundred, thousand; beyond is dim.
_RANK_STYLES = ((0, "bold green"), (9, "green"), (99, "cyan"), (999, "blue"))


def token_cell(token: Token | None, style: str = "") -> Text:
    """One token with its spaces and controls visible."""
    return Text(str(token) if token else "", style, no_wrap=True, overflow="ellipsis")


def tokens_cell(tokens: Iterable[Token], sought: Sequence[Token] = (), style: str = "") -> Text:
    """Several tokens, those that are sought emphasised."""
    cell = Text(no_wrap=True, overflow="ellipsis", style=style)
    for token in tokens:
        found = any(token.id == one.id for one in sought)
        cell.append(str(token), "bold green" if found else "")
        cell.append("  ")
    cell.rstrip()
    return cell


def rank_cell(rank: int | None) -> Text:
    """A rank, 0 being the top, in the colour of its bin."""
    if rank is None:
        return Text("")
    style = next((style for limit, style in _RANK_STYLES if rank <= limit), "dim")
    return Text(str(rank), style)


def probability_cell(probability: float | None) -> Text:
    """A probability with as many digits as tell it from 0 and from 1."""
    if probability is None:
        return Text("")
    return Text(f"{probability:.3f}" if probability >= 0.0005 else f"{probability:.0e}")


def percent_cell(share: float | None) -> Text:
    """A signed share of a sum in percent."""
    # Adding zero turns a rounded -0 into 0.
    return Text("" if share is None else f"{round(100 * share) + 0} %")


def signed_cell(value: float | None) -> Text:
    """A number that adds or subtracts."""
    if value is None:
        return Text("")
    return Text(f"{value:+.2f}", "red" if value < -0.005 else "")


def size_cell(value: float) -> Text:
    """A norm: three digits, whatever its magnitude."""
    return Text(f"{value:.3g}")


def level_cell(value: float, largest: float) -> Text:
    """A norm after a block as high as its square root is among others up to `largest`."""
    level = round(math.sqrt(value / largest) * (len(_LEVELS) - 1)) if largest > 0 else 0
    return Text(f"{_LEVELS[level]}{value:.3g}")
