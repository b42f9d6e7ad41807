"""The commands `models`, `tokenize`, `neurons`, `project` and `activations`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from januslens import _presentation as presentation
from januslens.arguments import Chat, Prompt
from januslens.cli.options import (
    COUNT,
    estimate_option,
    file_option,
    given,
    layer_list,
    lens_option,
    model_option,
    position_list,
    prompt_argument,
    save_result,
    show_estimate,
    usage_errors,
    with_chat,
    with_client,
)
from januslens.cli.tables import (
    console,
    heading,
    labelled,
    rank_cell,
    section,
    signed_cell,
    steps,
    table,
    tokens_cell,
)
from januslens.client import Client
from januslens.results.activations import Activations
from januslens.results.exports import require
from januslens.results.kinds import Site
from januslens.results.models import Model
from januslens.results.vectors import FoundNeurons, NeuronHit, Projection

_STATE_STYLES = {"READY": "green", "FAILED": "red", "LOADING": "yellow", "UNLOADING": "yellow"}


@click.command()
@with_client
def models(client: Client, as_json: bool) -> None:
    """List the models with their state, sizes and self-checks."""
    found = client.list_models()
    if as_json:
        return
    out = console()
    grid = models_table(found)
    unlimited = out.options.update(width=10_000)
    fits = out.measure(grid, options=unlimited).maximum <= out.width
    out.print(grid if fits else models_list(found))
    for model in found:
        if model.state_reason:
            out.print(f"{model.name}: {model.state_reason}")
        for limit in presentation.level_sentences(model.levels):
            out.print(f"{model.name}: {limit}", markup=False)


def models_table(models: Sequence[Model]) -> Table:
    """Return one row per model: state, sizes and self-checks."""
    grid = table("name", "state", "architecture", "weights", "revision", ">layers", ">heads")
    for column in ("width", "neurons", "tokens", "context"):
        grid.add_column(column, justify="right")
    grid.add_column("checks")
    for model in models:
        provenance = model.provenance
        grid.add_row(
            Text(model.name),
            Text(_state(model), _STATE_STYLES.get(model.state, "")),
            Text(provenance.architecture),
            Text(_weights(model)),
            Text(provenance.revision[:8]),
            *(Text(str(size)) if size else Text("") for size in _sizes(model)),
            _checks(model),
        )
    return grid


def models_list(models: Sequence[Model]) -> Table:
    """Return the contents of `models_table` for a narrow terminal: two lines per model."""
    grid = Table.grid(padding=(0, 2))
    names = ("layers", "heads", "width", "neurons", "tokens", "context")
    for model in models:
        provenance = model.provenance
        sizes = zip(names, _sizes(model), strict=True)
        known = [f"{name} {size}" for name, size in sizes if size]
        weights = [_weights(model)] if model.ready else []
        revision = [f"revision {provenance.revision[:8]}"] if provenance.revision else []
        state = Text(_state(model), _STATE_STYLES.get(model.state, ""))
        first = [state, Text(provenance.architecture), _checks(model)]
        grid.add_row(Text(model.name), Text("  ").join(part for part in first if part))
        grid.add_row("", Text(", ".join((*weights, *revision, *known)), "dim"))
    return grid


def _state(model: Model) -> str:
    """The state, and how far the loading is."""
    if model.state != "LOADING":
        return model.state
    return f"{model.state}: {presentation.loading_step(model)}"


def _weights(model: Model) -> str:
    return presentation.weights(model.provenance) if model.ready else ""


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
    passed = all(guarantee.held for guarantee in model.guarantees)
    return Text(presentation.checks(model), "" if passed else "red")


@click.command()
@click.argument("text", required=False)
@click.option(
    "--special-tokens", is_flag=True, help="Add special tokens such as BOS, as to a prompt."
)
@click.option("--literal", is_flag=True, help="Read control tokens in TEXT as ordinary text.")
@model_option
@with_client
@with_chat
def tokenize(
    client: Client, as_json: bool, /, *, text: str | None, chat: Chat | None, **options: Any
) -> None:
    """Show the tokens of TEXT or of a conversation, by position."""
    given(text, chat, "TEXT")
    with usage_errors():
        tokens = client.tokenize(text, messages=chat, **options)
    if as_json:
        return
    columns = [">position", ">id", "token", "bytes", ">characters"]
    grid = table(*columns, *([] if chat is None else [">message"]))
    for position, token in enumerate(tokens):
        characters = "" if token.start is None else f"{token.start}-{token.end}"
        cells: list[str | Text] = [
            str(position),
            str(token.id),
            Text(str(token)),
            token.raw.hex(" "),
            characters,
        ]
        if chat is not None:
            cells.append("" if token.message is None else str(token.message))
        grid.add_row(*cells)
    console().print(grid)


_NEURON_TOKENS = 5


def show_found_neurons(found: FoundNeurons, out: Console) -> None:
    """Print the token, the number of its neurons, and one row for each of the best neurons."""
    lines = labelled()
    lines.add_row("token", Text(f"{found.token} ({found.token.id})"))
    lines.add_row("model", Text(presentation.model_name(found.provenance), "dim"))
    lines.add_row("found", Text(_found(found)))
    out.print(lines)
    for limit in presentation.level_sentences(found.limited_layers):
        out.print(Text(limit, "dim"))
    if found.neurons:
        end = "from the bottom" if found.suppressed else "from the top"
        note = f"rank ({end}) and logit in the neuron's value, its row of FF2"
        out.print(section(_title(found), _neurons_table(found), note))


def _found(found: FoundNeurons) -> str:
    counted = "1 neuron has" if found.total == 1 else f"{found.total} neurons have"
    end = "bottom" if found.suppressed else "top"
    shown = "" if len(found.neurons) == found.total else f", {len(found.neurons)} shown"
    return f"{counted} it among the {end} {found.depth} tokens of the value vector{shown}"


def _title(found: FoundNeurons) -> str:
    verb = "suppress" if found.suppressed else "promote"
    return f"Neurons that {verb} {found.token}"


def _neurons_table(found: FoundNeurons) -> Table:
    grid = table(">rank", ">logit", "neuron", "promotes", "suppresses")
    for hit in found.neurons:
        grid.add_row(*_neuron_row(hit, found))
    return grid


def _neuron_row(hit: NeuronHit, found: FoundNeurons) -> list[Text]:
    return [
        rank_cell(hit.rank),
        signed_cell(hit.logit),
        Text(str(hit), no_wrap=True),
        tokens_cell(hit.value.top_tokens[:_NEURON_TOKENS], [found.token]),
        tokens_cell(hit.value.bottom_tokens[:_NEURON_TOKENS], [found.token]),
    ]


@click.command()
@click.argument("written", metavar="TOKEN")  # `token` is the name of the option --token
@click.option("--suppressed", is_flag=True, help="Show neurons that suppress TOKEN instead.")
@click.option("--layers", callback=layer_list, help="Layers, for example 0-3,7; default: all.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Maximum number of neurons.",
)
@model_option
@with_client
def neurons(client: Client, as_json: bool, /, *, written: str, **asked: Any) -> None:
    """Show the MLP neurons that promote TOKEN.

    Give TOKEN with its space, for example ' Paris'. No prompt is run: neurons are ranked by their
    value vectors, the rows of FF2.
    """
    with (
        usage_errors(),
        steps("searching the neurons"),
    ):  # the options have the names of the method's arguments
        found = client.find_neurons(written, **asked)
    if not as_json:
        show_found_neurons(found, console())


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--name", help="Tensor name in a safetensors file; needed if the file has several tensors."
)
@click.option(
    "--target", help="Also report the rank of this token, for example ' Paris' with its space."
)
@lens_option
@click.option("--top-k", type=COUNT, help="Most likely tokens per vector; default: 5.")
@click.option("--bottom-k", type=COUNT, help="Least likely tokens per vector; default: 5.")
@model_option
@with_client
def project(
    client: Client, as_json: bool, /, *, file: Path, name: str | None, **asked: Any
) -> None:
    """Project the vectors in FILE to the vocabulary.

    FILE is .npy or .safetensors, with the shape [d_model] or [n, d_model].
    """
    with usage_errors():  # the other options have the names of the method's arguments
        found = client.project(read_vectors(file, name), **asked)
    if not as_json:
        console().print(_projections_table(found))


def read_vectors(file: Path, name: str | None) -> NDArray[np.generic]:
    """Read the array of a .npy file, or one tensor of a .safetensors file.

    Raises:
        ValueError: The file has another type, or several tensors and none of them is `name`.
    """
    if file.suffix == ".npy":
        with file.open("rb") as stream:
            try:
                array: NDArray[np.generic] = np.lib.format.read_array(stream, allow_pickle=False)
            except ValueError as error:
                raise ValueError(f"{file.name} holds no array of numbers") from error
        return array
    if file.suffix != ".safetensors":
        raise ValueError(f"unsupported file {file.name!r}; expected .npy or .safetensors")
    safetensors = require("safetensors.numpy", "analysis", "reading safetensors")
    tensors: dict[str, NDArray[np.generic]] = safetensors.load_file(file)
    known = ", ".join(sorted(tensors)) or "none"
    if name is None and len(tensors) != 1:
        raise ValueError(f"{file.name} has {len(tensors)} tensors; choose one with --name: {known}")
    wanted = next(iter(tensors)) if name is None else name
    if wanted not in tensors:
        raise ValueError(f"{file.name} has no tensor {name!r}; expected one of {known}")
    return tensors[wanted]


def _projections_table(projections: list[Projection]) -> Table:
    grid = table(">row", "top", "bottom", ">entropy, bits", ">target's rank")
    for row, read in enumerate(projections):
        grid.add_row(
            str(row),
            tokens_cell(read.top_tokens),
            tokens_cell(read.bottom_tokens),
            Text(f"{read.entropy_bits:.2f}"),
            rank_cell(read.target_rank),
        )
    return grid


@click.command()
@click.option(
    "--site",
    "sites",
    multiple=True,
    default=["BLOCK_OUTPUT"],
    show_default=True,
    type=click.Choice([site.name for site in Site][1:], case_sensitive=False),
    help="Place in the forward pass to read (repeatable).",
)
@click.option(
    "--layers",
    callback=layer_list,
    help="Layers, for example 0-3,7; default: all that have the site.",
)
@click.option(
    "--positions", callback=position_list, help="Positions, for example -1,3; default: all."
)
@click.option("--heads", callback=layer_list, help="Heads, for example 0-3,7; default: all.")
@click.option(
    "--experts", callback=layer_list, help="Routed experts, for example 0-3,7; default: all."
)
@click.option("--float32", is_flag=True, help="Convert the values to float32.")
@file_option("--out", "Write the tensors to this safetensors file.")
@model_option
@estimate_option
@with_client
@prompt_argument
def activations(
    client: Client,
    as_json: bool,
    /,
    *,
    prompt: Prompt,
    out: Path | None,
    estimate: bool,
    **asked: Any,
) -> None:
    """Read tensors of the model's forward pass on PROMPT.

    Print the shape of each tensor, and write the values with --out.
    """
    if estimate:
        show_estimate(client.estimate_activations, as_json, prompt, asked)
        return
    with usage_errors():  # the other options have the names of the method's arguments
        stream = client.stream_activations(prompt, **asked)
    with stream, steps("reading"):
        found = stream.result()
    if not as_json:
        console().print(heading(found.prompt_tokens, found.provenance))
        for limit in presentation.level_sentences(found.header.limited_layers):
            console().print(Text(limit, "dim"))
        console().print(_tensors_table(found))
    save_result(out, found.save)


def _tensors_table(found: Activations) -> Table:
    grid = table("tensor", "dimensions", "shape", "data type")
    for tensor in found.tensors:
        shape = ", ".join(str(size) for size in tensor.tensor.shape)
        grid.add_row(tensor.name, ", ".join(tensor.dimensions), shape, tensor.tensor.data_type)
    return grid
