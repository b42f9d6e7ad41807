"""Run the surveys of findings.md, and draw its figures.

python docs/findings.py                               # all reports of all three models
python docs/findings.py gemma3                        # of one model
python docs/findings.py gemma3 --reports units edits  # some of its reports

The published models are read from .cache/real, which `make real` fills. Surveys and pages are
written to build/findings. An interrupted survey is resumed there, and a complete one is not run
again. A report is printed and drawn as soon as its surveys are complete.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import januslens
from demo_training.corpus import Fact, fact_prompts, facts_of
from januslens import Client, SweepOver, zero

ROOT = Path(__file__).parents[1]
REAL = ROOT / ".cache" / "real"
OUT = ROOT / "build" / "findings"
IMAGES = ROOT / "docs" / "images" / "findings"

# The wordings for the published models; the embedded model has its own.
WORDINGS = {
    "capital": (
        "The capital of {} is the city of",
        "The capital city of {} is called",
        "The government of {} is in the city of",
    ),
    "language": (
        "The official language of {} is",
        "The official language spoken in {} is",
        "The language that people in {} speak is",
    ),
}
STATES = [
    "BLOCK_INPUT", "ATTENTION_INPUT", "ATTENTION_CONCAT", "ATTENTION_SUM", "ATTENTION_OUTPUT",
    "RESIDUAL_MID", "MLP_INPUT", "MLP_SUM", "MLP_OUTPUT", "BLOCK_OUTPUT", "FINAL_NORM",
    "HEAD_OUTPUT",
]  # fmt: skip
# A head's contribution is that to ATTENTION_CONCAT.
PARTS = ["HEAD_OUTPUT", "ATTENTION_CONCAT", "ATTENTION_OUTPUT", "MLP_OUTPUT", "BLOCK_OUTPUT"]
UNITS = ["HEAD_OUTPUT", "ATTENTION_CONCAT", "MLP_VALUE", "MLP_SUM", "MLP_OUTPUT"]


@dataclass(frozen=True)
class Size:
    """How many prompts the surveys of a model have, and what they ask for.

    Attributes:
        states: Facts whose states are projected.
        units: Facts whose heads and neurons are counted, at all positions.
        measured: Facts in which each part is removed.
        gradients: Facts whose gradients are taken.
        edited: Facts that edits are previewed for.
        heads: Heads to select in each layer; about half of them.
        rates: Learning rates of descent steps.
        etas: Strengths of forward shifts.
        layers: Layers that are edited; None = all.
    """

    states: int
    units: int
    measured: int
    gradients: int
    edited: int
    heads: int
    rates: Sequence[float]
    etas: Sequence[float]
    layers: Sequence[int] | None = None


SIZES = {
    "demo": Size(660, 330, 660, 330, 66, 2, (0.01, 0.03, 0.1), (0.05, 0.15, 0.45)),
    "smollm2": Size(16, 16, 16, 8, 8, 4, (0.01, 0.1), (0.003, 0.03, 0.3), (0, 10, 20, 25, 29)),
    "gemma3": Size(32, 32, 16, 8, 8, 2, (0.01, 0.1), (0.003, 0.03, 0.3), (0, 6, 12, 15, 17)),
}


def other_answer(fact: Fact) -> str:
    """Return the answer of another fact of the relation: the target of an edit."""
    facts = facts_of(fact.relation)
    middle = facts.index(fact) + len(facts) // 2
    rotated = (facts[(middle + step) % len(facts)].answer for step in range(len(facts)))
    return next(answer for answer in rotated if answer != fact.answer)


def known(client: Client, name: str) -> Iterator[tuple[Fact, list[str]]]:
    """Yield facts with several prompts each; answer and other answer are single tokens."""
    if name == "demo":
        trained: dict[Fact, list[str]] = {}
        for prompt in fact_prompts("trained"):
            trained.setdefault(prompt.fact, []).append(prompt.text)
        for prompt in fact_prompts("held_out"):
            yield prompt.fact, [prompt.text, *trained[prompt.fact]]
        return
    for relation, wordings in WORDINGS.items():
        for fact in facts_of(relation):
            answers = (fact.answer, other_answer(fact))
            if all(len(client.tokenize(f" {answer}")) == 1 for answer in answers):
                yield fact, [wording.format(fact.subject) for wording in wordings]


def spread(found: Sequence[Any], count: int) -> list[Any]:
    """Return some elements, evenly spread; all of them if there are fewer."""
    count = min(count, len(found))
    return [found[i * len(found) // count] for i in range(count)]


@dataclass(frozen=True)
class Model:
    """A model that is served, and what is asked of it.

    Attributes:
        client: The client of its server.
        size: How much is asked.
        facts: What it may know, with several prompts each.
        out: The folder of its surveys.
    """

    client: Client
    size: Size
    facts: Sequence[tuple[Fact, list[str]]]
    out: Path

    def asked(self, count: int) -> list[dict[str, Any]]:
        """Return prompts whose targets are their answers."""
        return [
            {
                "prompt": prompts[0],
                "target": f" {fact.answer}",
                "labels": {"relation": fact.relation},
            }
            for fact, prompts in spread(self.facts, count)
        ]

    def survey(self, prompts: Sequence[dict[str, Any]], folder: str, **options: Any) -> Path:
        """Run or resume a survey; return its folder."""
        self.client.survey(prompts, self.out / folder, **options)
        return self.out / folder


def states(model: Model) -> list[Path]:
    """Project the states of the last position: for `norms` and `answers`."""
    asked = model.asked(model.size.states)
    options: dict[str, Any] = {"top_neurons": 1, "bottom_neurons": 0, "memory_values": 1}
    options |= {"heads": 0, "top_k": 10, "bottom_k": 0, "attribution": True}
    return [model.survey(asked, "states", node_kinds=STATES, **options)]


def units(model: Model) -> list[Path]:
    """Select heads and neurons at all positions."""
    # Without projections, which take most of the time where the vocabulary is large.
    options: dict[str, Any] = {"heads": model.size.heads, "memory_values": 1, "projections": False}
    asked = model.asked(model.size.units)
    return [model.survey(asked, "units", node_kinds=UNITS, positions="all", **options)]


def gradients(model: Model) -> list[Path]:
    """Take the gradients of the answers of other facts."""
    changed = [
        {"prompt": prompts[0], "target": f" {other_answer(fact)}", "subject": fact.subject}
        for fact, prompts in spread(model.facts, model.size.gradients)
    ]
    options: dict[str, Any] = {"rpc": "gradient_lens", "components": 0, "lens": "NORMALIZED"}
    return [model.survey(changed, "gradients", **options)]


def steps(model: Model) -> list[Path]:
    """Preview descent steps of FF2 towards the answers of other facts."""
    options: dict[str, Any] = {"learning_rates": model.size.rates, "matrices": ["FF2"]}
    return [_edits(model, "steps", **options)]


def shifts(model: Model) -> list[Path]:
    """Preview forward-pass shifts towards the answers of other facts."""
    return [_edits(model, "shifts", etas=model.size.etas, gradient_cosine=True)]


def _edits(model: Model, folder: str, **options: Any) -> Path:
    edited = [
        {
            "prompt": prompts[0],
            "target": f" {other_answer(fact)}",
            "probes": list(probes(model.facts, fact, prompts[1:])),
        }
        for fact, prompts in spread(model.facts, model.size.edited)
    ]
    return model.survey(edited, folder, rpc="preview_edits", layers=model.size.layers, **options)


def estimates(model: Model) -> list[Path]:
    """Estimate the effect of every head and sublayer, and measure it."""
    asked = model.asked(model.size.measured)
    found = [
        model.survey(
            asked, "estimates", node_kinds=PARTS, heads=0, attribution=True, projections=False
        )
    ]
    measured = {"heads": ("HEAD_RESULT", ["layer", "head"])}
    measured |= {"attention": ("ATTENTION_OUTPUT", ["layer"]), "mlps": ("MLP_OUTPUT", ["layer"])}
    for folder, (site, by) in measured.items():
        sweep = SweepOver(zero(site, positions=-1), by=by)
        found.append(model.survey(asked, folder, rpc="intervene", sweep=sweep, top_k=0))
    return found


def probes(
    facts: Sequence[tuple[Fact, list[str]]], fact: Fact, others: Sequence[str]
) -> Iterator[dict[str, str]]:
    """Yield other wordings of an edited fact, and prompts of other facts of its relation."""
    yield from ({"prompt": prompt, "label": "paraphrase"} for prompt in others[:2])
    neighbours = [
        prompts[0] for other, prompts in facts if other.relation == fact.relation and other != fact
    ]
    yield from ({"prompt": prompt, "label": "neighbour"} for prompt in spread(neighbours, 4))


# The surveys that each report reads. `edits` reads one of two surveys.
SURVEYS: Mapping[str, Callable[[Model], list[Path]]] = {
    "units": units,
    "norms": states,
    "answers": states,
    "gradients": gradients,
    "edits-steps": steps,
    "edits-shifts": shifts,
    "estimates": estimates,
}


def show(report: januslens.Report, name: str, drawn: str, client: Client) -> None:
    """Print a report, draw its figures, and write its page."""
    print(f"\n{drawn}, {report.source}", flush=True)
    for number, table in enumerate(report.tables):
        print(table.frame.head(60).round(3).to_string(index=False), flush=True)
        if table.figure is not None:
            kept = f"{drawn}-{name}.svg" if number == 0 else f"{drawn}-{number + 1}-{name}.svg"
            (IMAGES / kept).write_text(table.figure, encoding="utf-8")
    (OUT / name / f"{drawn}.html").write_text(report.to_html(), encoding="utf-8")
    if report.name == "units":
        neurons(report, client)


def neurons(report: januslens.Report, client: Client) -> None:
    """Print the tokens of the most frequent neurons, which were selected without projections."""
    frame = report.tables[1].frame
    frequent = frame[frame.kind == "MLP_VALUE"].head(6)
    listed: list[tuple[int, int]]
    listed = [(a, b) for a, b in frequent[["layer", "neuron"]].astype(int).to_numpy().tolist()]
    trace = client.trace("The", only_neurons=listed, node_kinds=["MLP_VALUE"], top_k=6, bottom_k=6)
    for node in trace.node_list:
        if node.projection is not None:
            ends = (node.projection.top_tokens, node.projection.bottom_tokens)
            tokens = " | ".join(" ".join(map(str, found)) for found in ends)
            print(f"L{node.layer} neuron {node.neuron}: {tokens}")


def main() -> None:
    """Run the surveys of some reports of some models, and show the reports."""
    parser = argparse.ArgumentParser(description="Run the surveys of findings.md.")
    parser.add_argument("models", nargs="*", help=f"{', '.join(SIZES)}; default: all")
    parser.add_argument("--reports", nargs="+", choices=SURVEYS, default=list(SURVEYS))
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    given = parser.parse_args()
    for name in given.models or SIZES:
        folders = [] if name == "demo" else [f"{name}={REAL / name}"]
        options = {"max_request_seconds": 600, "threads": given.threads}
        with januslens.launch(*folders, **options) as client:
            model = Model(client, SIZES[name], list(known(client, name)), OUT / name)
            for drawn in given.reports:
                report = januslens.report(drawn.split("-")[0], *SURVEYS[drawn](model))
                show(report, name, drawn, client)


if __name__ == "__main__":
    main()
