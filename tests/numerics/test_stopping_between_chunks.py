"""A cancelled request stops before the next chunk of rows is multiplied by the unembedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from januslens_server.errors import CancelCheck, RequestCancelled
from januslens_server.lens.head import LensHead
from januslens_server.lens.row_cache import ROWS
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.find_neurons import find_neurons
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.project import project_vectors
from januslens_server.pipelines.resolve import (
    resolve_find_neurons,
    resolve_gradient_lens,
    resolve_project,
    resolve_trace,
)
from januslens_server.pipelines.trace import trace
from januslens_server.results import NAMED_KINDS
from januslens_server.specs import (
    FindNeuronsSpec,
    GradientLensSpec,
    LensKind,
    LensSpec,
    NegativeLogLikelihood,
    ProjectSpec,
    Span,
    TraceSpec,
)
from tests.reference.examples import LoadExample, prompt

EXAMPLE = "llama_grouped"
CHECK, PRODUCT = "check", "product"

Request = Callable[[ResidentModel, CancelCheck], Iterator[object]]


class Recorded(LensHead):
    """A lens that records the rows of every product with the unembedding."""

    events: list[str]
    rows: list[int]

    def logits(self, prepared: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        self.events.append(PRODUCT)
        self.rows.append(len(prepared))
        return super().logits(prepared, out)


class Run:
    """One request to a fresh model, which is cancelled at the n-th check."""

    def __init__(self, resident: ResidentModel, request: Request, stop_at: int | None) -> None:
        self.events: list[str] = []
        self.rows: list[int] = []
        self._stop_at, self._checks = stop_at, 0
        model = self._model(resident)
        self.events.clear()
        self.rows.clear()
        self._checks = 0
        self.cancelled = False
        try:
            for _ in request(model, self._check):
                pass
        except RequestCancelled:
            self.cancelled = True

    def _model(self, resident: ResidentModel) -> ResidentModel:
        """A model whose chunks have one row, or as few as the row cache computes at once."""
        settings = vars(resident.view.lens) | {"chunk_bytes": 1}
        lens = Recorded(**settings)
        vars(lens).update(events=self.events, rows=self.rows)
        model = replace(resident, view=replace(resident.view, lens=lens))
        assert model.rows.usable  # it multiplies some rows when it is made, as at load
        return model

    def _check(self) -> None:
        self.events.append(CHECK)
        self._checks += 1
        if self._checks == self._stop_at:
            raise RequestCancelled("cancelled")


IDS = tuple(prompt(EXAMPLE, 9))
TRACE = TraceSpec(IDS[:4], all_positions=True, overlap_k=3, include_checks=True)
REQUESTS: dict[str, Request] = {
    "Trace": lambda model, check: trace(resolve_trace(model, TRACE), check),
    "Trace without the row cache": lambda model, check: trace(
        resolve_trace(model, replace(TRACE, lens=LensSpec(kind=LensKind.NORMALIZED))), check
    ),
    "GradientLens": lambda model, check: gradient_lens(
        resolve_gradient_lens(
            model,
            GradientLensSpec(
                IDS,
                NegativeLogLikelihood((7,)),
                NAMED_KINDS,
                spectrum_rank=3,
                neurons=4,
                learning_rate=0.1,
                subject=Span(2, 4),
            ),
        ),
        check,
    ),
    "Project": lambda model, check: project_vectors(
        resolve_project(model, ProjectSpec(np.eye(40, model.view.facts.d_model, dtype=np.float32))),
        check,
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_cancelled_request_stops_before_the_next_chunk(
    name: str, load_example: LoadExample
) -> None:
    resident, request = load_example(EXAMPLE).resident, REQUESTS[name]
    whole = Run(resident, request, stop_at=None)
    checks, products = whole.events.count(CHECK), whole.events.count(PRODUCT)
    assert products >= 40
    assert max(whole.rows) <= ROWS
    for before, event in zip([PRODUCT, *whole.events], whole.events, strict=False):
        assert (before, event) != (PRODUCT, PRODUCT)
    for stop_at in {1, checks // 3, checks // 2, checks - 1, checks}:
        stopped = Run(resident, request, stop_at)
        assert stopped.cancelled
        assert stopped.events.count(CHECK) == stop_at
        at = [i for i, event in enumerate(whole.events) if event == CHECK][stop_at - 1]
        assert stopped.events == whole.events[: at + 1]


def test_find_neurons_can_be_stopped_after_every_chunk(load_example: LoadExample) -> None:
    """Requests share the reading of a layer, so the request that takes the next step checks."""
    products: list[int] = []

    def request(model: ResidentModel, check: CancelCheck) -> Iterator[object]:
        lens = model.view.lens
        assert isinstance(lens, Recorded)
        for step in find_neurons(
            resolve_find_neurons(model, FindNeuronsSpec((9,), False, (), 0, 20)), check
        ):
            products.append(len(lens.rows))
            yield step

    Run(load_example(EXAMPLE).resident, request, stop_at=None)
    assert products[-1] >= 40
    assert max(np.diff([0, *products])) <= 1
