"""Run the surveys of findings.md, and draw its figures.

python docs/findings.py                 # the embedded model and both published ones
python docs/findings.py smollm2         # one of them

The published models are read from .cache/real, which `make real` fills. The surveys are written to
build/findings, where an interrupted one is resumed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
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
UNITS = ["HEAD_OUTPUT", "ATTENTION_CONCAT", "MLP_VALUE", "MLP_SUM", "MLP_OUTPUT"]


@dataclass(frozen=True)
class Size:
    """How many prompts each survey of a model has, and what it asks for.

    Attributes:
        facts: Facts whose states are traced.
        gradients: Facts whose gradients are taken.
        edited: Facts that edits are previewed for.
        heads: Heads to select in each layer; about half of them.
        rates: Learning rates of descent steps.
        etas: Strengths of forward shifts.
        layers: Layers that are edited; None = all.
    """

    facts: int
    gradients: int
    edited: int
    heads: int
    rates: Sequence[float]
    etas: Sequence[float]
    layers: Sequence[int] | None = None


SIZES = {
    "demo": Size(660, 330, 66, 2, (0.01, 0.03, 0.1), (0.05, 0.15, 0.45)),
    "smollm2": Size(16, 16, 6, 4, (0.01, 0.03, 0.1), (0.03, 0.1, 0.3), (0, 6, 12, 18, 24, 29)),
    "gemma3": Size(32, 24, 6, 2, (0.01, 0.03, 0.1), (0.03, 0.1, 0.3), (0, 4, 8, 12, 15, 17)),
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


def surveys(client: Client, name: str) -> None:
    """Run all surveys of a model."""
    size, out = SIZES[name], OUT / name
    facts = list(known(client, name))
    asked = [
        {"prompt": prompts[0], "target": f" {fact.answer}", "labels": {"relation": fact.relation}}
        for fact, prompts in spread(facts, size.facts)
    ]
    client.survey(
        asked, out / "states", node_kinds=STATES, heads=0, memory_values=1, top_neurons=1,
        bottom_neurons=0, top_k=10, bottom_k=0, attribution=True,
    )  # fmt: skip
    # Without projections, which take most of the time where the vocabulary is large.
    client.survey(
        spread(asked, 330), out / "units", node_kinds=UNITS, positions="all", heads=size.heads,
        memory_values=1, projections=False,
    )  # fmt: skip
    measured = {"heads": ("HEAD_RESULT", ["layer", "head"])}
    measured |= {"attention": ("ATTENTION_OUTPUT", ["layer"]), "mlps": ("MLP_OUTPUT", ["layer"])}
    for kind, (site, by) in measured.items():
        sweep = SweepOver(zero(site, positions=-1), by=by)
        client.survey(asked, out / kind, rpc="intervene", sweep=sweep, top_k=0)
    changed = [
        {"prompt": prompts[0], "target": f" {other_answer(fact)}", "subject": fact.subject}
        for fact, prompts in spread(facts, size.gradients)
    ]
    client.survey(changed, out / "gradients", rpc="gradient_lens", components=0, lens="NORMALIZED")
    edits = [
        {
            "prompt": prompts[0],
            "target": f" {other_answer(fact)}",
            "probes": list(probes(facts, fact, prompts[1:])),
        }
        for fact, prompts in spread(facts, size.edited)
    ]
    for kind, strengths in (("learning_rates", size.rates), ("etas", size.etas)):
        folder = "steps" if kind == "learning_rates" else "shifts"
        options: dict[str, Any] = {kind: strengths, "layers": size.layers}
        if kind == "learning_rates":
            options["matrices"] = ["FF2"]
        client.survey(edits, out / folder, rpc="preview_edits", **options)


def probes(
    facts: Sequence[tuple[Fact, list[str]]], fact: Fact, others: Sequence[str]
) -> Iterator[dict[str, str]]:
    """Yield other wordings of an edited fact, and prompts of other facts of its relation."""
    yield from ({"prompt": prompt, "label": "paraphrase"} for prompt in others[:2])
    neighbours = [
        prompts[0] for other, prompts in facts if other.relation == fact.relation and other != fact
    ]
    yield from ({"prompt": prompt, "label": "neighbour"} for prompt in spread(neighbours, 4))


# The surveys that each report reads.
READ = {
    "units": ("units",),
    "norms": ("states",),
    "answers": ("states",),
    "gradients": ("gradients",),
    "edits-steps": ("steps",),
    "edits-shifts": ("shifts",),
    "estimates": ("states", "heads", "attention", "mlps"),
}


def neurons(client: Client, name: str) -> None:
    """Print the tokens of the most frequent neurons."""
    frame = januslens.report("units", OUT / name / "units").tables[1].frame
    frequent = frame[frame.kind == "MLP_VALUE"].head(6)
    units: list[tuple[int, int]]
    units = [(a, b) for a, b in frequent[["layer", "neuron"]].astype(int).to_numpy().tolist()]
    trace = client.trace("The", only_neurons=units, node_kinds=["MLP_VALUE"], top_k=6, bottom_k=6)
    for node in trace.node_list:
        if node.projection is not None:
            ends = (node.projection.top_tokens, node.projection.bottom_tokens)
            tokens = " | ".join(" ".join(map(str, found)) for found in ends)
            print(f"L{node.layer} neuron {node.neuron}: {tokens}")


def figures(name: str) -> None:
    """Print the reports of a model, and draw the figures that the page shows."""
    for read, folders in READ.items():
        report = januslens.report(read.split("-")[0], *(OUT / name / folder for folder in folders))
        print(f"\n{read}, {report.source}")
        for number, table in enumerate(report.tables):
            print(table.frame.head(60).round(3).to_string(index=False))
            if table.figure is not None:
                kept = f"{read}-{name}.svg" if number == 0 else f"{read}-{number + 1}-{name}.svg"
                (IMAGES / kept).write_text(table.figure, encoding="utf-8")


def main(names: Sequence[str]) -> None:
    """Run the surveys of some models, and their reports."""
    for name in names:
        folders = [] if name == "demo" else [f"{name}={REAL / name}"]
        with januslens.launch(*folders, max_request_seconds=600) as client:
            surveys(client, name)
            neurons(client, name)
        figures(name)


if __name__ == "__main__":
    main(sys.argv[1:] or list(SIZES))
