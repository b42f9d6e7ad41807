"""The page of a gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from januslens._results.token_text import OPEN_BOX
from januslens._results.tokens import Token
from januslens.v1 import edits_pb2, gradient_lens_pb2
from januslens.viewer.page import page


def gradient_page(
    responses: Iterable[gradient_lens_pb2.GradientLensResponse],
    previews: Mapping[str, edits_pb2.PreviewEditResponse],
    prompt: Sequence[Token],
) -> str:
    """A gradient's stream, and what edits would do, by their titles, as one page."""
    title = "".join(str(token) for token in prompt).replace(OPEN_BOX, " ")
    streams = {f"preview:{name}": [response] for name, response in previews.items()}
    return page(
        "gradient", f"{title.strip()}, gradient · Januslens", {"gradient": responses, **streams}
    )
