"""Measure the speed of a model on its device, once, when it is loaded."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from januslens_server.errors import never_cancelled
from januslens_server.lens.projection import project
from januslens_server.models.interventions import Intervention, Interventions
from januslens_server.models.resident import ResidentModel, cost_sizes
from januslens_server.models.runner import forward
from januslens_server.pipelines.cost.demand import Demand, lens_flops, pass_flops
from januslens_server.pipelines.cost.trace import trace_demand
from januslens_server.pipelines.flows import LayerFlows, position_targets
from januslens_server.pipelines.metrics import StageClock
from januslens_server.pipelines.resolve import resolve_trace
from januslens_server.pipelines.trace import trace
from januslens_server.results import NodeKind
from januslens_server.specs import LensSpec, Noise, Operation, Scale, Site, TraceSpec

# Each linear model is fitted to measurements at two sizes.
TOKENS = (2, 32)
VECTORS = (1, 64)
# Values of a site that interventions change.
CHANGED = (2**10, 2**19)
# Target tokens whose ranks are measured.
RANKS = 4

# Number of layers, from the top, that are traced for the measurement. All layers of a deep model
# with a large vocabulary would take minutes.
LAYERS = 4

# Measurements are repeated until this many or until these seconds have passed; the shortest counts.
REPEATS, ENOUGH_SECONDS = 4, 0.25

Clock = Callable[[], float]


@dataclass(frozen=True)
class Pace:
    """Seconds per unit of each quantity of a `Demand`."""

    per_pass: float
    per_flop: float
    per_flow: float
    per_node: float
    per_read: float
    per_reading: float
    per_rank: float
    per_vector: float
    per_change: float = 0.0
    per_changed: float = 0.0
    per_drawn: float = 0.0

    def seconds(self, demand: Demand) -> float:
        """Return the estimated device time for a demand if nothing else runs."""
        return (
            demand.passes * self.per_pass
            + demand.flops * self.per_flop
            + demand.flows * self.per_flow
            + demand.nodes * self.per_node
            + demand.read * self.per_read
            + demand.readings * self.per_reading
            + demand.ranks * self.per_rank
            + demand.vectors * self.per_vector
            + demand.changes * self.per_change
            + demand.changed * self.per_changed
            + demand.drawn * self.per_drawn
        )


def measured_pace(model: ResidentModel, clock: Clock = time.perf_counter) -> Pace:
    """Measure passes and projections of two sizes, and one trace, on the model's device."""
    best = partial(_best, clock)
    sizes, head = cost_sizes(model), model.view.lens
    few, many = (min(tokens, sizes.facts.max_positions) for tokens in TOKENS)
    flops = [pass_flops(sizes, tokens) for tokens in (few, many)]
    times = [best(partial(_pass, model, tokens)) for tokens in (few, many)]
    per_pass, per_flop = _line(flops, times)
    rows = [torch.ones(n, sizes.facts.stream_width, device=model.device) for n in VECTORS]
    times = [best(partial(project, head, vectors, LensSpec())) for vectors in rows]
    per_reading, per_vector = _line([float(n) for n in VECTORS], times)
    per_vector = max(0.0, per_vector - lens_flops(sizes, 1) * per_flop)
    targets = torch.zeros(VECTORS[1], RANKS, dtype=torch.long, device=model.device)
    ranked = best(partial(project, head, rows[1], LensSpec(), targets))
    per_rank = max(0.0, ranked - times[1]) / targets.numel()
    without_graph = Pace(per_pass, per_flop, 0.0, 0.0, 0.0, per_reading, per_rank, per_vector)
    pace = _with_graph(model, without_graph, tuple(range(few)), clock)
    return _with_changes(model, pace, clock)


def _with_changes(model: ResidentModel, pace: Pace, clock: Clock) -> Pace:
    """Measure the time per change of a site, per changed value, and per value of noise."""
    width = model.view.facts.stream_width
    few, many = (max(1, values // width) for values in CHANGED)
    small, large = (_best(clock, partial(_change, model, n, Scale(0.5))) for n in (few, many))
    # A site is copied before its values change.
    per_change, per_changed = _line([2.0 * few * width, 2.0 * many * width], [small, large])
    noisy = _best(clock, partial(_change, model, many, Noise(0.5, 1)))
    per_drawn = max(0.0, noisy - large) / (many * width)
    return replace(pace, per_change=per_change, per_changed=per_changed, per_drawn=per_drawn)


def _change(model: ResidentModel, positions: int, operation: Operation) -> None:
    """Apply an intervention to a site of a prompt that has this many positions."""
    key = (0, Site.BLOCK_OUTPUT)
    found = Intervention((key,), tuple(range(positions)), None, operation)
    changes = Interventions(model, [found], positions, {}, never_cancelled)
    values = torch.ones(positions, model.view.facts.stream_width, device=model.device)
    float(changes.changed(key, values)[-1, 0])  # waits for a GPU to finish


def _with_graph(model: ResidentModel, pace: Pace, ids: tuple[int, ...], clock: Clock) -> Pace:
    """Measure the time per flow graph, per node, and per node that is projected.

    Building graphs is measured on its own, with one kind of node and with all kinds. In a whole
    trace, the error of the lens's time could be larger than the time of the graphs. Traces without
    and with projections are measured as well, because their nodes also take time to read.
    """
    n_layers = model.view.facts.n_layers
    layers = tuple(range(max(0, n_layers - LAYERS), n_layers))
    whole = TraceSpec(ids, layers=layers)
    alone = replace(whole, node_kinds=frozenset({NodeKind.BLOCK_OUTPUT}))
    bare = replace(whole, include_projections=False, lens=LensSpec(0, 0))
    requests = {spec: resolve_trace(model, spec) for spec in (alone, bare, whole)}
    demands = {spec: trace_demand(request) for spec, request in requests.items()}
    few, many = (_least(partial(_building, clock, model, ids, spec)) for spec in (alone, whole))
    pace = replace(pace, per_flow=few / (len(layers) + 1))  # one more for the final norm
    products = [
        demands[spec].flops - lens_flops(cost_sizes(model), demands[spec].vectors)
        for spec in (alone, whole)
    ]
    building = many - few - (products[1] - products[0]) * pace.per_flop

    def beyond(spec: TraceSpec) -> float:
        """Return the seconds that a trace takes beyond what the pace includes so far."""
        taken = _best(clock, lambda: list(trace(requests[spec], never_cancelled)))
        return taken - pace.seconds(demands[spec])

    per_node = max(0.0, building, beyond(bare)) / demands[bare].nodes
    pace = replace(pace, per_node=per_node)
    return replace(pace, per_read=max(0.0, beyond(whole)) / demands[whole].read)


def _building(clock: Clock, model: ResidentModel, ids: tuple[int, ...], spec: TraceSpec) -> float:
    """Measure the seconds to build the graphs of a trace, without its pass and projections."""
    last = (len(ids) - 1,)
    passed = forward(model, ids, spec.layers, never_cancelled, last, last)
    targets = position_targets(model, passed.residual, last, (None,), never_cancelled)
    pieces = LayerFlows(model, spec, passed, None).pieces(spec.layers, targets, StageClock("Trace"))
    return _seconds(clock, lambda: deque(pieces, 0))


def _pass(model: ResidentModel, tokens: int) -> None:
    logits = forward(model, range(tokens), (), never_cancelled, scored=(tokens - 1,)).logits
    float(logits[-1, 0])  # waits for a GPU to finish


def _best(clock: Clock, run: Callable[[], object]) -> float:
    """Return the shortest of several times that `run` takes, in seconds."""
    return _least(partial(_seconds, clock, run))


def _seconds(clock: Clock, run: Callable[[], object]) -> float:
    started = clock()
    run()
    return clock() - started


def _least(measure: Callable[[], float]) -> float:
    """Return the smallest of several measurements, or a single one if it takes long."""
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < REPEATS and time.perf_counter() - started < ENOUGH_SECONDS:
        times.append(measure())
    return min(times)


def _line(sizes: list[float], seconds: list[float]) -> tuple[float, float]:
    """Return intercept and slope of the line through two points; neither is negative."""
    (x, larger_x), (y, larger_y) = sizes, seconds
    slope = max(0.0, larger_y - y) / (larger_x - x) if larger_x > x else 0.0
    slope = min(slope, larger_y / larger_x)
    return max(0.0, y - slope * x), slope
