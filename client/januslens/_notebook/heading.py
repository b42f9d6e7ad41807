"""What a result is about: prompt and model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

from januslens._notebook.cells import tokens
from januslens._notebook.elements import element

if TYPE_CHECKING:
    from januslens._results.provenance import Provenance
    from januslens._results.tokens import Token


def heading(kind: str, prompt: Sequence[Token], provenance: Provenance) -> Element:
    """The result's name, the prompt's tokens and which weights read them."""
    model = (
        f"{provenance.model}, {provenance.architecture}, {provenance.data_type} on "
        f"{provenance.device}, revision {provenance.revision[:12]}"
    )
    return element(
        "div",
        element("p", element("b", f"{kind} "), tokens(prompt)),
        element("p", model, classes="d"),
    )


def cut(complete: bool) -> list[Element]:
    """A line that says so where a stream was cut."""
    return [] if complete else [element("p", element("b", "Cut short: the summary is missing."))]
