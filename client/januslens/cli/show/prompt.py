"""What a result is about: the first lines."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from januslens._results.provenance import Provenance
from januslens._results.tokens import Token
from januslens._results.trace_events import PositionTarget
from januslens.cli.show.cells import probability_cell
from januslens.cli.show.words import at


def model_line(provenance: Provenance) -> Text:
    """Which weights computed it, where and in what."""
    return Text(
        f"model   {provenance.model} ({provenance.architecture}, {provenance.data_type} on "
        f"{provenance.device}), revision {provenance.revision[:12]}",
        style="dim",
    )


def prompt_line(prompt: Sequence[Token]) -> Text:
    """The prompt's tokens, numbered by position."""
    line = Text("prompt  ")
    for position, token in enumerate(prompt):
        line.append(f"{position}", "dim")
        line.append(f" {token}  ")
    line.rstrip()
    return line


def target_line(target: PositionTarget, prompt: Sequence[Token]) -> Text:
    """The token looked for, and what the model makes of it."""
    line = Text("target  ")
    line.append(str(target.target), "bold green")
    line.append(f" after {at(target.position, prompt)}: ")
    if target.target_rank == 0:
        line.append("the model's own prediction")
    else:
        line.append(f"rank {target.target_rank}; the model predicts {target.predicted}")
    line.append(f", probability {probability_cell(target.target_probability)}")
    return line
