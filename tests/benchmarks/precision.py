"""Measure the error of gradients in half precision: `python -m tests.benchmarks.precision`.

For each data type, prints the relative error of every matrix's gradient, `||G - G_32|| / ||G_32||`,
over prompts of the embedded model. It also prints the part of the error that is due to rounding the
weights, measured with the rounded weights in float32. The rest is due to computing in that type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from januslens_server.lens.backward_lens import negative_log_likelihood
from januslens_server.models.adapters import view_of
from januslens_server.models.loader import load
from januslens_server.models.registry import embedded_source
from januslens_server.models.resident import ResidentModel
from januslens_server.models.runner import backward
from januslens_server.results import MatrixKind

KINDS = tuple(kind for kind in MatrixKind if kind.name in {"Q", "K", "V", "O", "FF1", "FF2"})
QUESTIONS = (
    ("The capital of Japan is the city of", " Tokyo"),
    ("The capital of Japan is the city of", " Paris"),
    ("Lionel Messi plays for", " Madrid"),
    ("When Mary and John went to the store, John gave a drink to", " Mary"),
)


@dataclass(frozen=True)
class Errors:
    """Relative errors over matrices and prompts, and VJP entries that became zero."""

    largest: float
    mean: float
    vanished: int


def main() -> None:
    """Print the table."""
    exact = list(gradients(load(embedded_source("cpu", "float32"))))
    table = Table("computed in", "largest error", "mean error", "vanished VJP entries")
    for data_type in ("bfloat16", "float16"):
        half = load(embedded_source("cpu", data_type))
        add_row(table, f"{data_type} throughout", compare(gradients(half), exact))
        half.network.float()
        upcast = ResidentModel(
            half.name, half.network, view_of(half.network), half.vocabulary, half.provenance
        )
        add_row(
            table, f"float32, weights rounded to {data_type}", compare(gradients(upcast), exact)
        )
    Console().print(table)


def gradients(model: ResidentModel) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Return each matrix's dense gradient and VJPs, in the order of prompts and matrices."""
    layers = range(model.view.facts.n_layers)
    for prompt, target in QUESTIONS:
        ids = [token.id for token in model.vocabulary.encode_prompt(prompt)]
        (chosen,) = model.vocabulary.encode_continuation(target)
        keys = [(layer, kind) for layer in layers for kind in KINDS]
        loss = negative_log_likelihood([chosen.id])
        for factors in backward(model, ids, loss, keys, lambda: None).factors.values():
            yield factors.inputs.float().T @ factors.vjps, factors.vjps


def compare(
    found: Iterator[tuple[torch.Tensor, torch.Tensor]],
    exact: list[tuple[torch.Tensor, torch.Tensor]],
) -> Errors:
    """Return the errors of gradients relative to those of the float32 model."""
    errors, vanished = [], 0
    for (gradient, vjps), (true_gradient, true_vjps) in zip(found, exact, strict=True):
        errors.append(float((gradient - true_gradient).norm() / true_gradient.norm()))
        vanished += int(((vjps == 0) & (true_vjps != 0)).sum())
    return Errors(max(errors), sum(errors) / len(errors), vanished)


def add_row(table: Table, name: str, errors: Errors) -> None:
    """Add the row of one data type."""
    table.add_row(name, f"{errors.largest:.1%}", f"{errors.mean:.2%}", str(errors.vanished))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
