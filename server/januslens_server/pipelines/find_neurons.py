"""FindNeurons: find the MLP neurons that promote or suppress a token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from januslens_server.errors import CancelCheck, InvalidRequest
from januslens_server.lens.projection import PendingTable, Readings
from januslens_server.models.experts import Experts
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.resolve import ResolvedFindNeurons
from januslens_server.results import FoundNeurons, Ints
from januslens_server.specs import LensSpec


class _Hits(NamedTuple):
    """Neurons that list the token, with the projections of their values.

    `places` `[n, 3]` are layer, expert (-1 = none) and neuron. `ranks` `[n]` are those of the
    token, counted from the searched end.
    """

    places: Ints
    ranks: Ints
    readings: Readings


def find_neurons(
    request: ResolvedFindNeurons, _check_cancelled: CancelCheck
) -> Iterator[FoundNeurons | None]:
    """Index the layers that are not indexed yet, yielding None meanwhile, then yield one page.

    Raises `InvalidRequest` if the page does not exist.
    """
    model, spec, token, layers = request.model, request.spec, request.token, request.layers
    for layer in layers:
        yield from model.neurons.reading(layer)
    hits = _joined([_of_layer(model, layer, token, spec.suppressed) for layer in layers])
    if spec.start and spec.start >= len(hits.ranks):
        raise InvalidRequest(
            "page_token",
            "page_token was not issued for this list; request the first page without one",
        )
    page = _order(hits, spec.suppressed)[spec.start : spec.start + spec.count]
    rows = torch.from_numpy(page)
    shown = Readings(**{name: column[rows] for name, column in vars(hits.readings).items()})
    yield FoundNeurons(
        token=model.vocabulary.token(token),
        layers=hits.places[page, 0],
        experts=hits.places[page, 1],
        neurons=hits.places[page, 2],
        ranks=hits.ranks[page],
        projections=PendingTable(
            model.view.lens,
            torch.ones(len(page), dtype=torch.bool),
            [shown],
            torch.full((len(page), 1), token),
        ).table(),
        depth=model.neurons.depth,
        total=len(hits.ranks),
        provenance=model.provenance,
        limited_layers=request.limited_layers,
    )


def read_all_neurons(model: ResidentModel, after_layer: Callable[[], object]) -> None:
    """Index all layers now, instead of when the first request needs them."""
    for layer, block in model.view.known.items():
        if block.mlp is not None:
            model.neurons.layer(layer)
        after_layer()


def _of_layer(model: ResidentModel, layer: int, token: int, suppressed: bool) -> _Hits:
    facts = model.view.facts
    index = model.neurons.layer(layer)
    listed = index.listing(token, suppressed=suppressed)
    rows = listed.rows.numpy()
    layers, none = np.full_like(rows, layer), np.full_like(rows, -1)
    mlp, expert, neuron = model.view.mlp(layer), none, rows
    if isinstance(mlp, Experts):  # the shared expert is last, and may be wider than the others
        expert = np.minimum(rows // mlp.width, mlp.count)
        neuron = rows - expert * mlp.width
    count = LensSpec().top_k
    return _Hits(
        places=np.stack([layers, expert, neuron], axis=1),
        ranks=listed.ranks.numpy(),
        readings=index.readings(listed, facts.vocab_size, count, suppressed=suppressed),
    )


def _joined(hits: list[_Hits]) -> _Hits:
    columns = {
        name: torch.cat([vars(part.readings)[name] for part in hits])
        for name in vars(hits[0].readings)
    }
    return _Hits(
        places=np.concatenate([part.places for part in hits]),
        ranks=np.concatenate([part.ranks for part in hits]),
        readings=Readings(**columns),
    )


def _order(hits: _Hits, suppressed: bool) -> Ints:
    """Return the order by rank, then logit, then layer, expert and neuron."""
    logits = hits.readings.target_logits[:, 0].numpy()
    order: Ints = np.lexsort((logits if suppressed else -logits, hits.ranks))
    return order
