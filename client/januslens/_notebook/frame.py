"""A whole interactive page within a notebook."""

from __future__ import annotations

from dataclasses import dataclass, field

from januslens._notebook.elements import document, element


@dataclass(frozen=True)
class PageFrame:
    """A page that a notebook shows where it is the result of a cell.

    It stands in a frame of its own, from which its script cannot reach the notebook.

    Attributes:
        html: The page, as a file would hold it.
        height: Of the frame, in pixels.
    """

    html: str = field(repr=False)
    height: int

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        frame = element(
            "iframe",
            srcdoc=self.html,
            sandbox="allow-scripts allow-downloads allow-popups",
            style=f"width:100%;height:{self.height}px;border:1px solid rgba(128,128,128,.35)",
        )
        return document(frame)
