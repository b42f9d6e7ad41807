"""Measure a demo model: `python -m demo_training.evaluate [DIR]`.

Prints every figure with its minimum. If a figure is below its minimum, names it and exits with
status 1. The model card quotes these figures.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo_training.corpus import Prompt, fact_prompts, indirect_object_prompts
from demo_training.measurements import (
    DemoModel,
    accuracy,
    after_other_documents,
    measure_shifts,
    measure_vjps,
    sample_edits,
)
from januslens_server.demo import model_path

RUNNING_EXAMPLES = (
    Prompt("The capital of Japan is the city of", "Tokyo"),
    Prompt("The capital of France is the city of", "Paris"),
    Prompt("Lionel Messi plays for", "Barcelona"),
    Prompt("When Mary and John went to the store, John gave a drink to", "Mary"),
)
INDIRECT_OBJECTS = 1_000
INDIRECT_OBJECT_SEED = 0
# Samples of about 300, 100 and 300 of the 3,300 trained prompts. They cover all relations and
# wordings.
CONTEXT_STRIDE = 11
VJP_STRIDE = 31
SHIFT_STRIDE = 11


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured fraction and its minimum; a minimum of 0 means that it is only reported."""

    name: str
    value: float
    floor: float

    @property
    def reached(self) -> bool:
        """Whether the figure reaches its minimum."""
        return self.value >= self.floor

    def __str__(self) -> str:
        """The figure's line in the report."""
        need = f"  (at least {self.floor:.3f})" if self.floor else ""
        return f"{self.name:58s} {self.value:.4f}{need}{'' if self.reached else '  FELL SHORT'}"


def evaluate(folder: Path) -> tuple[Figure, ...]:
    """Return all figures of the model in `folder`."""
    demo = DemoModel.load(folder)
    return (
        *_recall_figures(demo),
        *_vjp_figures(demo),
        *_shift_figures(demo),
    )


def _recall_figures(demo: DemoModel) -> list[Figure]:
    indirect = indirect_object_prompts(INDIRECT_OBJECTS, INDIRECT_OBJECT_SEED)
    late = after_other_documents(demo, fact_prompts("trained")[::CONTEXT_STRIDE], seed=1)
    asked: tuple[tuple[str, Sequence[Prompt], float], ...] = (
        ("running examples", RUNNING_EXAMPLES, 1.0),
        ("facts in trained wordings", fact_prompts("trained"), 1.0),
        ("facts in the wording each was never trained in", fact_prompts("held_out"), 0.99),
        ("facts in wordings that were never trained", fact_prompts("unseen"), 0.0),
        ("facts at the end of a full context", late, 0.9),
        ("indirect objects, pairs of names never trained", indirect, 1.0),
    )
    return [Figure(name, accuracy(demo, prompts), floor) for name, prompts, floor in asked]


def _vjp_figures(demo: DemoModel) -> list[Figure]:
    measured = measure_vjps(demo, sample_edits(VJP_STRIDE))
    ranks = [
        Figure(f"target's rank in FF2's VJP, layer {layer} (1: very bottom)", rank, 0.98)
        for layer, rank in enumerate(measured.target_rank)
    ]
    dominance = [
        Figure(f"largest VJP at the last or last subject token, layer {layer}", share, 0.9)
        for layer, share in enumerate(measured.dominance)
    ]
    return ranks + dominance


def _shift_figures(demo: DemoModel) -> list[Figure]:
    measured = measure_shifts(demo, sample_edits(SHIFT_STRIDE))
    return [
        Figure("shift: the edited prompt gives the target", measured.efficacy, 0.93),
        Figure("shift: other wordings of the fact give the target", measured.paraphrases, 0.88),
        Figure("shift: unchanged, other facts of the relation", measured.same_relation, 0.87),
        Figure("shift: unchanged, other relations", measured.other_relations, 0.87),
    ]


def main() -> None:
    """Print the report; exit with status 1 if a figure is below its minimum."""
    parser = argparse.ArgumentParser(prog="python -m demo_training.evaluate")
    parser.add_argument("folder", type=Path, nargs="?", default=model_path(), metavar="DIR")
    figures = evaluate(parser.parse_args().folder)
    print(*figures, sep="\n")
    if short := [figure.name for figure in figures if not figure.reached]:
        sys.exit(f"fell short: {'; '.join(short)}")


if __name__ == "__main__":
    main()
