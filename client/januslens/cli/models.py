"""`januslens models`: what a server serves."""

from __future__ import annotations

import click
from rich.table import Table
from rich.text import Text

from januslens._client import Client
from januslens._results.models import Model
from januslens.cli.session import with_client
from januslens.cli.show.console import console, table

_STATE_STYLES = {"READY": "green", "FAILED": "red", "LOADING": "yellow"}


@click.command()
@with_client
def models(client: Client, as_json: bool) -> None:
    """List the models with their state, sizes and self-checks."""
    found = client.list_models()
    if as_json:
        return
    out = console()
    out.print(_table(found))
    for model in found:
        if model.state_reason:
            out.print(f"{model.name}: {model.state_reason}")


def _table(models: list[Model]) -> Table:
    grid = table("name", "state", "architecture", "weights", "revision", ">layers", ">heads")
    for heading in ("width", "neurons", "tokens", "context"):
        grid.add_column(heading, justify="right")
    grid.add_column("checks")
    for model in models:
        provenance = model.provenance
        grid.add_row(
            Text(model.name),
            Text(model.state, _STATE_STYLES.get(model.state, "")),
            Text(provenance.architecture),
            Text(f"{provenance.data_type} on {provenance.device}" if model.ready else ""),
            Text(provenance.revision[:8]),
            *(Text(str(size)) if size else Text("") for size in _sizes(model)),
            _checks(model),
        )
    return grid


def _sizes(model: Model) -> tuple[int, ...]:
    return (
        model.n_layers,
        model.n_heads,
        model.d_model,
        model.d_mlp,
        model.vocab_size,
        model.max_positions,
    )


def _checks(model: Model) -> Text:
    """How many guarantees the self-check found held, and by name which did not."""
    broken = [guarantee.name for guarantee in model.guarantees if not guarantee.held]
    if broken:
        return Text(f"failed: {', '.join(broken)}", "red")
    return Text(f"{len(model.guarantees)} held" if model.guarantees else "")
