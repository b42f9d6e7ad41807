"""What an edit would do, as a table."""

from __future__ import annotations

from rich.console import Group
from rich.text import Text

from januslens._results.edits import EditPreview, Effect
from januslens.cli.show.cells import probability_cell, rank_cell, token_cell
from januslens.cli.show.console import section, table


def preview_section(preview: EditPreview, title: str) -> Group:
    """One row a prompt: the target's probability and rank, and the prediction, then and now."""
    grid = table("prompt", "target", "probability", "rank", "prediction", ">KL, bits")
    for effect in (preview.edited, *preview.probes):
        grid.add_row(*_row(effect))
    note = "each before → after; KL: how far the whole distribution moves"
    return section(title, grid, note)


def _row(effect: Effect) -> list[Text]:
    before = probability_cell(effect.probability_before)
    after = probability_cell(effect.probability_after)
    return [
        Text(effect.label or "the edited one", no_wrap=True, overflow="ellipsis"),
        token_cell(effect.target),
        _change(before, after),
        _change(rank_cell(effect.rank_before), rank_cell(effect.rank_after)),
        _change(token_cell(effect.predicted_before), token_cell(effect.predicted_after)),
        Text(f"{effect.kl_bits:.3g}"),
    ]


def _change(before: Text, after: Text) -> Text:
    return Text.assemble(before, (" → ", "dim"), after, no_wrap=True)
