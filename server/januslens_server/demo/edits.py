"""Counterfactual targets: what the measurements of gradients and shifts try to teach the model."""

from dataclasses import dataclass

from januslens_server.demo.corpus import FactPrompt, fact_prompts
from januslens_server.demo.facts import facts_of


@dataclass(frozen=True, slots=True)
class Edit:
    """A prompt the model answers rightly, and another answer of the same kind for it."""

    prompt: FactPrompt
    target: str


def sample_edits(stride: int) -> list[Edit]:
    """Every `stride`-th trained prompt with the answer of a fact half the table away."""
    return [Edit(prompt, _other_answer(prompt)) for prompt in fact_prompts("trained")[::stride]]


def _other_answer(prompt: FactPrompt) -> str:
    facts = facts_of(prompt.fact.relation)
    middle = facts.index(prompt.fact) + len(facts) // 2
    rotated = (facts[(middle + step) % len(facts)].answer for step in range(len(facts)))
    return next(answer for answer in rotated if answer != prompt.answer)
