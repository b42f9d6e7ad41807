"""Activations: the tensors of one forward pass, by layer and site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch

from januslens_server.errors import CancelCheck
from januslens_server.graph.weights import attention_patterns
from januslens_server.models.interventions import hidden_sources
from januslens_server.models.runner import prepared, read_sites
from januslens_server.models.sites import AFTER_LAYERS, BEFORE_LAYERS, SITES_WITH_HEADS, SiteKey
from januslens_server.pipelines.metrics import StageClock
from januslens_server.pipelines.resolve import ResolvedActivations
from januslens_server.results import (
    ActivationsEvent,
    ActivationsHeader,
    ActivationsSummary,
    SiteValues,
)
from januslens_server.specs import Site
from januslens_server.transfer import to_host

# Bytes of the values that one step returns, after which other requests may run.
STEP_BYTES = 4 * 2**20

Values = Mapping[SiteKey, torch.Tensor]


def activations(
    request: ResolvedActivations, check_cancelled: CancelCheck
) -> Iterator[ActivationsEvent]:
    """Yield the header, then the values of each site, lowest layer first, then the summary.

    `check_cancelled` is called before every block of the pass and before every piece of values.
    What it raises ends the request.
    """
    clock = StageClock("Activations")
    clock.add("tokenize", request.seconds)
    model, positions = request.model, request.positions
    with clock.stage("forward"):
        ids = [token.id for token in request.tokens]
        wanted = _rows_of(request, len(ids))
        scored = (
            positions if any(site is Site.LOGITS for _, site in request.keys) else (len(ids) - 1,)
        )
        changes = prepared(model, request.interventions, len(ids), check_cancelled)
        values, logits = read_sites(
            model, ids, wanted, scored, check_cancelled, changes, request.experts or None
        )
    yield ActivationsHeader(model.provenance, request.tokens, positions, request.limited_layers)
    for key in request.keys:
        for piece in _pieces(request, key, values, logits):
            check_cancelled()
            with clock.stage("copy"):
                found = piece()
            yield found
    yield ActivationsSummary(clock.times())


def _rows_of(request: ResolvedActivations, length: int) -> dict[SiteKey, Sequence[int]]:
    """Return the positions to keep of each tensor; patterns need the keys of all sources."""
    wanted: dict[SiteKey, Sequence[int]] = {
        key: request.positions
        for key in request.keys
        if key[1] not in (Site.LOGITS, Site.ATTENTION_PATTERN)
    }
    for layer, site in request.keys:
        if site is Site.ATTENTION_PATTERN:
            wanted[layer, Site.QUERY] = request.positions
            wanted[layer, Site.KEY] = range(length)
    return wanted


def _pieces(
    request: ResolvedActivations, key: SiteKey, values: Values, logits: torch.Tensor
) -> Iterator[partial[SiteValues]]:
    """Yield a function for each piece of a site's tensor, which computes and copies its rows."""
    row_bytes = 4 * request.sizes[key]
    rows = max(1, STEP_BYTES // row_bytes)
    for start in range(0, len(request.positions), rows):
        yield partial(_piece, request, key, values, logits, slice(start, start + rows))


@torch.inference_mode()
def _piece(
    request: ResolvedActivations,
    key: SiteKey,
    values: Values,
    logits: torch.Tensor,
    rows: slice,
) -> SiteValues:
    layer, site = key
    if site is Site.LOGITS:
        found = logits[rows]
    elif site is Site.ATTENTION_PATTERN:
        found = _pattern(request, layer, values, rows)
    else:
        found = values[key]
        if len(found) > len(request.positions):  # keys that a pattern needs
            found = found[list(request.positions)]
        found = found[rows]
    if request.heads and site in SITES_WITH_HEADS:
        found = found[:, list(request.heads)]
    if request.spec.float32:
        found = found.float()
    layered = site not in BEFORE_LAYERS + AFTER_LAYERS
    return SiteValues(
        site=site,
        layer=layer if layered else None,
        shape=(len(request.positions), *found.shape[1:]),
        offset=rows.start * found[0].numel(),
        data_type=str(found.dtype).removeprefix("torch."),
        data=to_host(found.contiguous())[0].view(torch.uint8).flatten().numpy(),
    )


def _pattern(request: ResolvedActivations, layer: int, values: Values, rows: slice) -> torch.Tensor:
    attention = request.model.view.attention(layer)
    query, key = values[layer, Site.QUERY], values[layer, Site.KEY]
    rotation = None
    if attention.rotation is not None:
        rotation = attention.rotation(len(request.tokens)).to(query.device)
    positions = request.positions[rows]
    return attention_patterns(
        query[rows],
        key,
        positions,
        rotation,
        attention.scoring,
        hidden_sources(request.interventions, layer),
    )
