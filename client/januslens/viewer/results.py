"""Register the pages of a trace and of a gradient, which results call without importing them."""

from __future__ import annotations

from collections.abc import Mapping

from januslens._results.edits import EditPreview
from januslens._results.gradient import Gradient
from januslens._results.rendering import page_html
from januslens._results.trace import Trace
from januslens.viewer.html import gradient_page, trace_page


@page_html.register
def page_of_trace(trace: Trace, overview: Trace | None) -> str:
    """A trace, and the residual stream around it, as one page."""
    around = overview.responses if overview else ()
    return trace_page(trace.responses, around, trace.prompt_tokens)


@page_html.register
def page_of_gradient(gradient: Gradient, previews: Mapping[str, EditPreview]) -> str:
    """A gradient, and previews of edits by their titles, as one page."""
    effects = {title: preview.response for title, preview in previews.items()}
    return gradient_page(gradient.responses, effects, gradient.prompt_tokens)
