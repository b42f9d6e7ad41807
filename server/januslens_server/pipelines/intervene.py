"""Intervene: the effects of many changed passes on the prediction of one prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from januslens_server.errors import CancelCheck
from januslens_server.models.interventions import Intervention, Interventions
from januslens_server.models.runner import block_outputs, copies, prepared, taken_values
from januslens_server.models.sites import SiteKey
from januslens_server.pipelines.experiments import Experiment
from januslens_server.pipelines.metrics import StageClock
from januslens_server.pipelines.resolve import ResolvedIntervene
from januslens_server.results import (
    ExperimentEffect,
    ExperimentEffects,
    InterveneEvent,
    InterveneHeader,
    InterveneSummary,
    Outcome,
)
from januslens_server.transfer import to_host

# Numbered experiments, all with the same lowest layer.
Batch = tuple[int, list[tuple[int, Experiment]]]
Taken = Mapping[tuple[int, SiteKey], torch.Tensor]


def intervene(
    request: ResolvedIntervene, check_cancelled: CancelCheck
) -> Iterator[InterveneEvent | None]:
    """Yield the header, then the effects of each batch of experiments, then the summary.

    Blocks below the lowest one that an experiment changes do not run again. `check_cancelled` is
    called before every block. What it raises ends the request.
    """
    clock = StageClock("Intervene")
    clock.add("tokenize", request.seconds)
    model, positions = request.model, request.positions
    ids = [token.id for token in request.tokens]
    with clock.stage("before"):
        outputs, logits = block_outputs(model, ids, None, positions, check_cancelled)
        reader = OutcomeReader(request, logits)
        before = reader.outcomes(logits)
        del logits
    yield InterveneHeader(
        model.provenance,
        request.tokens,
        positions,
        before,
        len(request.experiments),
        request.at_once,
    )
    with clock.stage("sources"):
        always = list(request.always)
        own = [i for experiment in request.experiments for i in experiment.interventions]
        taken = taken_values(model, [*always, *own], check_cancelled)
        if always:
            changes = prepared(model, always, len(ids), check_cancelled)
            outputs = block_outputs(model, ids, changes, positions[-1:], check_cancelled)[0]
    yield None
    for batch in batches(request):
        with clock.stage("experiments"):
            effects = _effects(request, batch, taken, outputs, reader, check_cancelled)
        yield ExperimentEffects(effects)
    yield InterveneSummary(len(request.experiments), clock.times())


def _effects(
    request: ResolvedIntervene,
    batch: Batch,
    taken: Taken,
    outputs: Sequence[Any],
    reader: OutcomeReader,
    check_cancelled: CancelCheck,
) -> list[ExperimentEffect]:
    """Run a batch. Its logits are freed, so they are not held between two steps."""
    lowest, numbered = batch
    ids = [token.id for token in request.tokens]
    changes = _together(request, lowest, numbered, taken, len(ids), check_cancelled)
    logits = copies(
        request.model,
        ids,
        len(numbered),
        changes,
        lowest,
        outputs,
        request.positions,
        check_cancelled,
    )
    return [
        ExperimentEffect(number, experiment.label, experiment.coordinates, reader.outcomes(after))
        for (number, experiment), after in zip(numbered, logits, strict=True)
    ]


def batches(request: ResolvedIntervene) -> Iterator[Batch]:
    """Yield experiments that run together, those with the lowest changed layer first."""
    top = request.model.view.facts.n_layers - 1
    ordered = sorted(enumerate(request.experiments), key=lambda pair: pair[1].lowest)
    for lowest, group in groupby(ordered, key=lambda pair: min(max(0, pair[1].lowest), top)):
        members = list(group)
        for start in range(0, len(members), request.at_once):
            yield lowest, members[start : start + request.at_once]


def _together(
    request: ResolvedIntervene,
    lowest: int,
    numbered: Sequence[tuple[int, Experiment]],
    taken: Taken,
    length: int,
    check_cancelled: CancelCheck,
) -> Interventions:
    """Return the changes of a batch: each experiment changes its own copy of the prompt."""
    changes: list[Intervention] = []
    values: dict[tuple[int, SiteKey], torch.Tensor] = {}
    for copy, (number, experiment) in enumerate(numbered):
        check_cancelled()
        sources = list(enumerate(request.always))
        sources += list(enumerate(experiment.interventions, request.first_numbers[number]))
        for source, intervention in sources:
            shifted = tuple(copy * length + position for position in intervention.positions)
            for key in intervention.keys if intervention.sources else ():
                values[len(changes), key] = taken[source, key]
            changes.append(replace(intervention, positions=shifted))
    start = first_changed(lowest)
    return Interventions(request.model, changes, length, values, check_cancelled, start)


def first_changed(lowest: int) -> int:
    """Return the first layer that a batch changes; -1 is the input of the first block."""
    return -1 if lowest == 0 else lowest


class OutcomeReader:
    """Compares logits `[positions, vocab]` with those before any intervention."""

    def __init__(self, request: ResolvedIntervene, before: torch.Tensor) -> None:
        """The target is the requested token, or the prediction of `before`."""
        self._request = request
        self._before = before.float().log_softmax(-1)
        own = before.argmax(-1)
        target = request.target
        self._targets = own if target is None else torch.full_like(own, target)

    @torch.inference_mode()
    def outcomes(self, logits: torch.Tensor) -> list[Outcome]:
        """Return the outcome at each position."""
        logits = logits.float()
        after = logits.log_softmax(-1)
        targets = self._targets[:, None]
        own = logits.gather(1, targets)
        other = self._request.other
        probabilities = self._before.exp()
        terms = probabilities * (self._before - after)
        divergence = torch.where(probabilities > 0, terms, 0.0).sum(-1)
        logarithms = after.gather(1, targets)[:, 0]
        top = after.topk(min(self._request.spec.top_k, logits.shape[-1]), dim=-1)
        figures = to_host(
            self._targets,
            logarithms.exp(),
            own[:, 0],
            (logits > own).sum(-1),
            own[:, 0] if other is None else own[:, 0] - logits[:, other],
            divergence,
            top.indices,
            top.values.exp(),
            logarithms,
        )
        columns: list[list[Any]] = [column.tolist() for column in figures]
        if other is None:
            columns[4] = [None] * len(own)
        rows = zip(self._request.positions, *columns, strict=True)
        return [Outcome(*row) for row in rows]
