"""Draw the figures of experiments.md from runs of the embedded model and two published ones.

python docs/figures.py                 # all figures
python docs/figures.py causal_trace    # one of them

The published models are read from .cache/real, which `make real` fills.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import januslens
from januslens import Client, Experiment, Intervention, Sweep, Trace, zero
from januslens._charts import Curve, Drawing, chart, legend, svg
from januslens._presentation import change_colour, ink_on

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
REAL = ROOT / ".cache" / "real"

EIFFEL = "The Eiffel Tower is located in the city of"
JAPAN = "The capital of Japan is the city of"
CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"


# ---- Drawing ----------------------------------------------------------------------------------


def save(drawing: Drawing, name: str, described: str) -> None:
    """Write docs/images/NAME.svg."""
    (IMAGES / f"{name}.svg").write_text(svg(drawing.element(described)), encoding="utf-8")


def heat_map(drawing: Drawing, x: float, y: float, sweep: Sweep, title: str) -> float:
    """Draw a sweep, last layer at the top, with a number in large cells; return its right edge."""
    effects = sweep.logit_effects
    largest = float(np.abs(effects).max())
    small = len(sweep.layers) > 12
    cell = (22.0, 9.0) if small else (38.0, 24.0)
    drawing.text(x, y, title, bold=True)
    measured = str(sweep.target) + (f" minus {sweep.other}" if sweep.other else "")
    scale = f"; colours: ±{largest:.2f}" if small else ""
    drawing.text(x, y + 15, f"{measured}: {sweep.before.logit:+.2f} before{scale}", colour="#555")
    left, top = x + 22, y + 24
    for row, layer in enumerate(reversed(sweep.layers)):
        for column, label in enumerate(sweep.labels):
            value = float(effects[len(sweep.layers) - 1 - row, column])
            colour = change_colour(value, largest)
            at = left + column * cell[0], top + row * cell[1]
            drawing.rectangle(
                *at, cell, "#" + bytes(colour).hex(), f"layer {layer}, {label}: {value:+.2f}"
            )
            if not small:
                ink = "#" + bytes(ink_on(colour)).hex()
                middle = at[0] + cell[0] / 2
                drawing.text(middle, at[1] + 16, f"{value:+.1f}", anchor="middle", colour=ink)
        if not small or layer % 5 == 0:
            drawing.text(left - 4, top + (row + 0.5) * cell[1] + 4, str(layer), anchor="end")
    bottom = top + len(sweep.layers) * cell[1]
    for column, label in enumerate(sweep.labels):
        shown = label.removeprefix("head ") if small else label
        drawing.text(left + (column + 0.4) * cell[0], bottom + 12, shown, turned=True)
    right = left + len(sweep.labels) * cell[0]
    return right + 40


# ---- Models -----------------------------------------------------------------------------------

MODELS = {"demo": "demo", "smollm2": "SmolLM2 135M", "gemma3": "Gemma 3 270M"}


@cache
def served(name: str) -> Client:
    """Serve one of the models until this process ends."""
    folders = [] if name == "demo" else [f"{name}={REAL / name}"]
    return januslens.launch(*folders, max_request_seconds=600)


def both(draw: Callable[[Client], Sweep], other: Callable[[Client], Sweep], name: str) -> None:
    """Draw a sweep of the embedded model beside one of SmolLM2."""
    drawing = Drawing()
    right = heat_map(drawing, 10, 18, draw(served("demo")), "demo")
    heat_map(drawing, right, 18, other(served("smollm2")), MODELS["smollm2"])
    save(drawing, name, f"Changes of a logit by layer: {name.replace('-', ' ')}")


def causal_trace() -> None:
    """Restore states of the pass with a corrupted subject."""
    both(
        lambda client: januslens.causal_trace(client, JAPAN, " Tokyo", "Japan"),
        lambda client: januslens.causal_trace(client, EIFFEL, " Paris", "Eiffel Tower"),
        "causal-trace",
    )


def attention_knockout() -> None:
    """Hide source positions from the last one."""
    both(
        lambda client: januslens.attention_knockouts(client, JAPAN, " Tokyo", window=2),
        lambda client: januslens.attention_knockouts(client, EIFFEL, " Paris", window=8),
        "attention-knockout",
    )


def head_knockouts() -> None:
    """Zero each head at the last position."""
    both(
        lambda client: januslens.head_knockouts(client, CLEAN, " Mary", " John", positions=[-1]),
        lambda client: januslens.head_knockouts(client, CLEAN, " Mary", " John", positions=[-1]),
        "head-knockouts",
    )


def patching() -> None:
    """Take states from the prompt in which the other person gives."""
    both(
        lambda client: januslens.activation_patching(client, CLEAN, CORRUPTED, " Mary", " John"),
        lambda client: januslens.activation_patching(client, CLEAN, CORRUPTED, " Mary", " John"),
        "patching",
    )


# ---- Steering ---------------------------------------------------------------------------------

COUNTRIES = ("Peru", "Chile", "France", "Egypt")
STRENGTHS = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]


def steering() -> None:
    """Add a direction from capitals to another relation, with several strengths."""
    drawing = Drawing()
    capital = "The capital of {} is the city of"
    wordings = {
        "demo": ("The currency of {} is the", " yen", 2),
        "smollm2": ("The language that people speak in {} is", " Japanese", 20),
    }
    for column, (name, (wording, answer, layer)) in enumerate(wordings.items()):
        client = served(name)
        direction = mean_state(client, wording, layer) - mean_state(client, capital, layer)
        found: dict[str, list[float]] = {" Tokyo": [], answer: []}
        for strength in STRENGTHS:
            change = januslens.steer(layer, direction, strength, positions=-1)
            for target, values in found.items():
                after = client.intervene(JAPAN, target=target, experiments=[change])
                values.append(after.effects[0].after[0].probability)
        curves = [
            Curve("␣Tokyo", found[" Tokyo"], "#205c9c"),
            Curve(answer.replace(" ", "␣"), found[answer], "#ac3e1c", "5 3"),
        ]
        title = f"{MODELS[name]}, after layer {layer}"
        chart(drawing, 10 + column * 260, 40, title, STRENGTHS, curves, (0, 1), "strength")
        print(name, {k: [round(v, 3) for v in vs] for k, vs in found.items()})
        legend(drawing, 10 + column * 260, 16, curves)
    save(drawing, "steering", "Probability of both answers by the strength of the direction")


def mean_state(client: Client, wording: str, layer: int) -> NDArray[np.float32]:
    """Return the mean state after a layer, at the last position of a prompt about each country."""
    states = [
        client.activations(wording.format(country), layers=layer, positions=-1, float32=True)
        for country in COUNTRIES
    ]
    found: NDArray[np.float32] = np.mean([s.array("BLOCK_OUTPUT")[0] for s in states], axis=0)
    return found


# ---- Estimates and measured effects -----------------------------------------------------------

PROMPTS = {
    "demo": [
        "The capital of Japan is the city of",
        "The capital of Peru is the city of",
        "The capital of France is the city of",
        "The currency of Japan is the",
        "Lionel Messi plays for",
        CLEAN,
    ],
    "real": [
        EIFFEL,
        CLEAN,
        "The capital of Japan is the city of",
        "The opposite of hot is",
        "Shakespeare wrote the play Romeo and",
    ],
}
KINDS = ("HEAD_OUTPUT", "MLP_VALUE", "ATTENTION_OUTPUT", "MLP_OUTPUT")
NAMES = dict(zip(KINDS, ("heads", "neurons", "attention", "MLPs"), strict=True))
NEURONS = 8  # per layer: half of the largest contributions, half of the smallest


@dataclass(frozen=True)
class Point:
    """The estimates and the measured effect of one part."""

    kind: str
    layer: int
    contribution: float
    attribution: float
    effect: float


def points(client: Client, prompt: str) -> Iterator[Point]:
    """Yield the parts at the last position, each with what zeroing it takes from the logit."""
    trace = client.trace(
        prompt,
        heads=0,
        memory_values=1,
        top_neurons=NEURONS // 2,
        bottom_neurons=NEURONS // 2,
        top_k=0,
        bottom_k=0,
        select_by="CONTRIBUTION",
        attribution=True,
    )
    parts = list(measured_parts(trace))
    found = client.intervene(
        prompt,
        target=trace.target().target.id,
        experiments=[Experiment([change]) for *_, change in parts],
        top_k=0,
    )
    before = found.before[0].logit
    for (kind, layer, contribution, attribution, _), effect in zip(
        parts, found.effects, strict=True
    ):
        yield Point(kind, layer, contribution, attribution, before - effect.after[0].logit)


def measured_parts(trace: Trace) -> Iterator[tuple[str, int, float, float, Intervention]]:
    """Yield kind, layer, contribution, attribution and the change that removes the part."""
    for edge in trace.edge_list:
        node = trace.node(edge.source)
        if node.kind not in KINDS or edge.attribution is None or edge.logit_contribution is None:
            continue
        layer = node.layer or 0
        if node.kind == "HEAD_OUTPUT":
            change = zero(heads=[(layer, node.head or 0)], positions=-1)
        elif node.kind == "MLP_VALUE":
            change = zero(neurons=[(layer, node.neuron or 0)], positions=-1)
        else:
            change = zero(str(node.kind), layers=layer, positions=-1)
        yield str(node.kind), layer, edge.logit_contribution, edge.attribution, change


def correlation(found: Sequence[Point], estimate: str) -> float:
    """Return Pearson's correlation of an estimate and the effect."""
    estimates = [getattr(point, estimate) for point in found]
    return float(np.corrcoef(estimates, [point.effect for point in found])[0, 1])


def around(found: Sequence[Point], layer: int) -> list[Point]:
    """Return the parts of a layer, and of its neighbours until there are 12."""
    near: list[Point] = []
    for distance in range(len(found)):
        near = [point for point in found if abs(point.layer - layer) <= distance]
        if len(near) >= 12:
            break
    return near


def estimates() -> None:
    """Correlate both estimates with the measured effects, by model, kind and layer."""
    drawing = Drawing()
    names = ("contribution", "attribution")
    styles = {"contribution": ("#205c9c", ""), "attribution": ("#ac3e1c", "5 3")}
    for row, (model, title) in enumerate(MODELS.items()):
        found: list[Point] = []
        for prompt in PROMPTS["demo" if model == "demo" else "real"]:
            found += points(served(model), prompt)
            print(f"{model}: {len(found)} parts measured", flush=True)
        layers = sorted({point.layer for point in found})
        for column, kind in enumerate(KINDS):
            of_kind = [point for point in found if point.kind == kind]
            curves = []
            for name in names:
                by_layer = [correlation(around(of_kind, layer), name) for layer in layers]
                curves.append(
                    Curve(f"direct {name}" if name == names[0] else name, by_layer, *styles[name])
                )
            whole = [correlation(of_kind, name) for name in names]
            print(
                model,
                kind,
                len(of_kind),
                "all layers:",
                [round(r, 3) for r in whole],
                "by layer:",
                [[round(v, 2) for v in c.values] for c in curves],
                flush=True,
            )
            heading = f"{title}: {NAMES[kind]}"
            at = 10 + column * 250, 44 + row * 170
            chart(drawing, *at, heading, layers, curves, (-1, 1), "layer")
        if row == 0:
            legend(drawing, 10, 18, curves)
        described = "Correlation of two estimates with measured effects, by kind and layer"
        save(drawing, "estimates", described)


FIGURES = {
    "causal_trace": causal_trace,
    "attention_knockout": attention_knockout,
    "head_knockouts": head_knockouts,
    "patching": patching,
    "steering": steering,
    "estimates": estimates,
}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or FIGURES:
        FIGURES[wanted]()
