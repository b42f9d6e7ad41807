"""Entry points by which results are rendered; the renderers register themselves.

Results do not import renderers: `januslens._notebook` registers the HTML of a notebook's cell for
each type of result, and `januslens.viewer.results` the interactive pages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any


@singledispatch
def notebook_html(result: Any) -> str:
    """The HTML that a notebook shows for a result."""
    raise TypeError(f"no notebook HTML for {type(result).__name__}")


@singledispatch
def page_html(result: Any, beside: Any) -> str:
    """A result, and what is shown beside it, as one interactive HTML file."""
    raise TypeError(f"no page for {type(result).__name__} and {type(beside).__name__}")


@dataclass(frozen=True)
class PageFrame:
    """A page that a notebook shows where it is the result of a cell.

    It has a frame of its own, from which its script cannot reach the notebook.

    Attributes:
        html: The page, as a file would hold it.
        height: Height of the frame in pixels.
    """

    html: str = field(repr=False)
    height: int

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)
