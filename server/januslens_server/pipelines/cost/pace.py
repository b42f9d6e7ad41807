"""How fast a model computes here: measured once when it is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from januslens_server.lens.projection import project
from januslens_server.models.resident import ResidentModel
from januslens_server.models.runner import forward
from januslens_server.models.sizes import model_sizes
from januslens_server.pipelines.cost.demand import Demand, lens_flops, pass_flops
from januslens_server.pipelines.cost.traced import trace_demand
from januslens_server.pipelines.trace import trace
from januslens_server.specs import LensSpec, TraceSpec

# Sizes of the two measurements through which each line is laid.
TOKENS = (2, 32)
VECTORS = (1, 64)

# Fast models are measured several times and the best is taken, slow ones once.
REPEATS, ENOUGH_SECONDS = 4, 0.25

Clock = Callable[[], float]


@dataclass(frozen=True)
class Pace:
    """Seconds for a pass, a floating-point operation, a node, a call of the lens and a vector."""

    per_pass: float
    per_flop: float
    per_node: float
    per_reading: float
    per_vector: float

    def seconds(self, demand: Demand) -> float:
        """What the demand should take of the device, with nothing else running."""
        return (
            demand.passes * self.per_pass
            + demand.flops * self.per_flop
            + demand.nodes * self.per_node
            + demand.readings * self.per_reading
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
    rest = Pace(per_pass, per_flop, 0.0, per_reading, per_vector)
    spec = TraceSpec(prompt=tuple(range(few)))
    demand = trace_demand(model, spec)
    traced = best(lambda: list(trace(model, spec, _go_on)))
    per_node = max(0.0, traced - rest.seconds(demand)) / demand.nodes
    return Pace(per_pass, per_flop, per_node, per_reading, per_vector)


def _pass(model: ResidentModel, tokens: int) -> None:
    logits = forward(model, range(tokens), (), _go_on, scored=(tokens - 1,)).logits
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


def _go_on() -> None:
    """Measuring has no caller who could cancel it."""
