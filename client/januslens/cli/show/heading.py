"""What a result is about: the first lines, a label before each."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from januslens._results.provenance import Provenance
from januslens._results.tokens import Token


def heading(prompt: Sequence[Token], provenance: Provenance) -> Table:
    """The prompt's tokens, numbered by position, and which weights read them."""
    lines = labelled()
    lines.add_row("prompt", _numbered(prompt))
    lines.add_row("model", Text(model_in_words(provenance), "dim"))
    return lines


def labelled() -> Table:
    """Lines to be added: a label, and a text that may wrap beside it."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", min_width=6)
    grid.add_column()
    return grid


def _numbered(prompt: Sequence[Token]) -> Text:
    pieces = [Text.assemble((f"{i}\u00a0", "dim"), str(token)) for i, token in enumerate(prompt)]
    return Text("  ").join(pieces)


def model_in_words(provenance: Provenance) -> str:
    """Name, architecture, data type, device and revision."""
    return (
        f"{provenance.model} ({provenance.architecture}, {provenance.data_type} on "
        f"{provenance.device}), revision {provenance.revision[:12]}"
    )
