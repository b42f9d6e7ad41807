"""How fast a model computes here: measured once when it is loaded."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from januslens_server.errors import never_cancelled
from januslens_server.lens.projection import project
from januslens_server.models.resident import ResidentModel
from januslens_server.models.runner import forward
from januslens_server.models.sizes import model_sizes
from januslens_server.pipelines.clock import StageClock
from januslens_server.pipelines.cost.demand import Demand, lens_flops, pass_flops
from januslens_server.pipelines.cost.traced import trace_demand
from januslens_server.pipelines.flows import LayerFlows
from januslens_server.pipelines.targets import position_targets
from januslens_server.pipelines.trace import trace
from januslens_server.results import NodeKind
from januslens_server.specs import LensSpec, TraceSpec

# Sizes of the two measurements through which each line is laid.
TOKENS = (2, 32)
VECTORS = (1, 64)
# Target tokens whose ranks are measured.
RANKS = 4

# Fast models are measured several times and the best is taken, slow ones once.
REPEATS, ENOUGH_SECONDS = 4, 0.25

Clock = Callable[[], float]


@dataclass(frozen=True)
class Pace:
    """Seconds for each of what a `Demand` counts."""

    per_pass: float
    per_flop: float
    per_block: float
    per_node: float
    per_reading: float
    per_rank: float
    per_vector: float

    def seconds(self, demand: Demand) -> float:
        """What the demand should take of the device, with nothing else running."""
        return (
            demand.passes * self.per_pass
            + demand.flops * self.per_flop
            + demand.blocks * self.per_block
            + demand.nodes * self.per_node
            + demand.readings * self.per_reading
            + demand.ranks * self.per_rank
            + demand.vectors * self.per_vector
        )


def measured_pace(model: ResidentModel, clock: Clock = time.perf_counter) -> Pace:
    """Short and longer passes and readings, and one trace, on the model's own device."""
    best = partial(_best, clock)
    sizes, head = model_sizes(model), model.view.lens
    few, many = (min(tokens, sizes.facts.max_positions) for tokens in TOKENS)
    flops = [pass_flops(sizes, tokens) for tokens in (few, many)]
    times = [best(partial(_pass, model, tokens)) for tokens in (few, many)]
    per_pass, per_flop = _line(flops, times)
    rows = [torch.ones(n, sizes.facts.d_model, device=model.device) for n in VECTORS]
    times = [best(partial(project, head, vectors, LensSpec())) for vectors in rows]
    per_reading, per_vector = _line([float(n) for n in VECTORS], times)
    per_vector = max(0.0, per_vector - lens_flops(sizes, 1) * per_flop)
    targets = torch.zeros(VECTORS[1], RANKS, dtype=torch.long, device=model.device)
    ranked = best(partial(project, head, rows[1], LensSpec(), targets))
    per_rank = max(0.0, ranked - times[1]) / targets.numel()
    without_graph = Pace(per_pass, per_flop, 0.0, 0.0, per_reading, per_rank, per_vector)
    return _with_graph(model, without_graph, tuple(range(few)), best)


def _with_graph(
    model: ResidentModel,
    pace: Pace,
    ids: tuple[int, ...],
    best: Callable[[Callable[[], object]], float],
) -> Pace:
    """Add what blocks and nodes take: from graphs of one kind and of all, and one whole trace.

    Graphs are measured alone, since where the lens takes most of a trace its error hides them;
    the trace, since nodes take time while they are read, too.
    """
    alone, whole = TraceSpec(ids, node_kinds=frozenset({NodeKind.BLOCK_OUTPUT})), TraceSpec(ids)
    demands = [trace_demand(model, spec) for spec in (alone, whole)]
    few, many = (best(partial(_graph, model, ids, spec)) for spec in (alone, whole))
    passing = best(partial(_graph, model, ids, alone, build=False))
    blocks = model.view.facts.n_layers
    per_block = max(0.0, few - passing) / (blocks + 1)  # and the final norm's
    products = [d.flops - lens_flops(model_sizes(model), d.vectors) for d in demands]
    building = many - few - (products[1] - products[0]) * pace.per_flop
    pace = replace(pace, per_block=per_block)
    traced = best(lambda: list(trace(model, whole, never_cancelled))) - pace.seconds(demands[1])
    return replace(pace, per_node=max(0.0, building, traced) / demands[1].nodes)


def _graph(
    model: ResidentModel, ids: tuple[int, ...], spec: TraceSpec, *, build: bool = True
) -> None:
    """The pass of a trace of the last position, and its graph without readings."""
    layers, last = range(model.view.facts.n_layers), (len(ids) - 1,)
    passed = forward(model, ids, layers, never_cancelled, last, last)
    targets = position_targets(model, passed.residual, last, None, never_cancelled)
    if build:
        deque(LayerFlows(model, spec, passed).pieces(layers, targets, StageClock("Trace")), 0)


def _pass(model: ResidentModel, tokens: int) -> None:
    logits = forward(model, range(tokens), (), never_cancelled, scored=(tokens - 1,)).logits
    float(logits[-1, 0])  # until then a GPU may still compute


def _best(clock: Clock, run: Callable[[], object]) -> float:
    """The shortest time, in seconds."""
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < ENOUGH_SECONDS:
        started = clock()
        run()
        times.append(clock() - started)
    return min(times)


def _line(sizes: list[float], seconds: list[float]) -> tuple[float, float]:
    """Start and slope of the line through two points; neither is negative."""
    (x, larger_x), (y, larger_y) = sizes, seconds
    slope = max(0.0, larger_y - y) / (larger_x - x) if larger_x > x else 0.0
    slope = min(slope, larger_y / larger_x)
    return max(0.0, y - slope * x), slope
