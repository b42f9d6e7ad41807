"""Neurons that write a token, as a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from januslens._results.neurons import FoundNeurons, NeuronHit
from januslens.cli.show.cells import rank_cell, signed_cell, tokens_cell
from januslens.cli.show.console import section, table
from januslens.cli.show.heading import labelled, model_in_words

_SHOWN = 5


def show_found_neurons(found: FoundNeurons, out: Console) -> None:
    """The token, how many neurons write it, and one row for each of the best."""
    lines = labelled()
    lines.add_row("token", Text(f"{found.token} ({found.token.id})"))
    lines.add_row("model", Text(model_in_words(found.provenance), "dim"))
    lines.add_row("found", Text(_found(found)))
    out.print(lines)
    if found.neurons:
        end = "from the bottom" if found.suppressed else "from the top"
        note = f"rank ({end}) and logit in the neuron's value, its row of FF2"
        out.print(section(_title(found), _table(found), note))


def _found(found: FoundNeurons) -> str:
    counted = "1 neuron has" if found.total == 1 else f"{found.total} neurons have"
    end = "bottom" if found.suppressed else "top"
    shown = "" if len(found.neurons) == found.total else f", {len(found.neurons)} shown"
    return f"{counted} it among the {end} {found.depth} tokens of their value{shown}"


def _title(found: FoundNeurons) -> str:
    verb = "suppress" if found.suppressed else "promote"
    return f"The neurons that {verb} {found.token}"


def _table(found: FoundNeurons) -> Table:
    grid = table(">rank", ">logit", "neuron", "promotes", "suppresses")
    for hit in found.neurons:
        grid.add_row(*_row(hit, found))
    return grid


def _row(hit: NeuronHit, found: FoundNeurons) -> list[Text]:
    return [
        rank_cell(hit.rank),
        signed_cell(hit.logit),
        Text(str(hit), no_wrap=True),
        tokens_cell(hit.value.top_tokens[:_SHOWN], [found.token]),
        tokens_cell(hit.value.bottom_tokens[:_SHOWN], [found.token]),
    ]
