"""Create the training corpus: facts, documents that state them, and prompts that test them.

All of it is reproducible from seeds.
"""

import json
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Literal

from demo_training.templates import (
    ADJECTIVES,
    FILLER,
    INDIRECT_OBJECT,
    NAMES,
    OBJECTS,
    PLACES,
    RELATIONS,
)

FACTS_FILE = Path(__file__).with_name("facts.json")


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact. The answer is one word, which is one token with its leading space."""

    subject: str
    relation: str
    answer: str


@cache
def load_facts() -> tuple[Fact, ...]:
    """Return all facts, in the order of the file's tables and columns.

    The first column of a table has the subjects; every other column is a relation with its name.
    """
    tables = json.loads(FACTS_FILE.read_text(encoding="utf-8"))
    return tuple(
        Fact(subject=row[0], relation=relation, answer=row[column])
        for table in tables.values()
        for column, relation in enumerate(table["columns"])
        if column > 0
        for row in table["rows"]
    )


@cache
def facts_of(relation: str) -> tuple[Fact, ...]:
    """Return the facts of one relation, in the file's order."""
    return tuple(fact for fact in load_facts() if fact.relation == relation)


Split = Literal["trained", "held_out", "unseen"]

LIST_LENGTHS = (2, 3, 4)
# Every seventh ordered pair of names is left out of the corpus, to test whether the model has
# learned the rule and not the pairs.
HELD_OUT_PAIR_STRIDE = 7


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text and the word that must follow it."""

    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class FactPrompt(Prompt):
    """A prompt for a fact, in one of the wordings of its relation.

    Attributes:
        split: `trained` if the corpus states the fact in this wording; `held_out` if fact and
            wording both occur, but not together; `unseen` if the wording does not occur in the
            corpus.
    """

    fact: Fact
    split: Split


@cache
def fact_prompts(split: Split) -> tuple[FactPrompt, ...]:
    """Return all prompts of a split, fact by fact."""
    return tuple(
        FactPrompt(template.format(subject=fact.subject), fact.answer, fact, split)
        for relation in RELATIONS
        for index, fact in enumerate(facts_of(relation))
        for template in _templates(relation, index, split)
    )


def _templates(relation: str, index: int, split: Split) -> tuple[str, ...]:
    """Return the wordings of the relation's `index`-th fact in a split."""
    trained = RELATIONS[relation].trained
    held_out = index % len(trained)
    if split == "unseen":
        return RELATIONS[relation].unseen
    if split == "held_out":
        return (trained[held_out],)
    return trained[:held_out] + trained[held_out + 1 :]


@cache
def name_pairs(*, held_out: bool) -> tuple[tuple[str, str], ...]:
    """Return the ordered pairs of different names that the corpus has or leaves out."""
    pairs = permutations(NAMES, 2)
    return tuple(
        pair for i, pair in enumerate(pairs) if (i % HELD_OUT_PAIR_STRIDE == 0) == held_out
    )


def indirect_object_prompts(count: int, seed: int) -> list[Prompt]:
    """Return `count` prompts in which one person gives another an object.

    The corpus contains each of the names, but none of these ordered pairs of names.
    """
    rng = random.Random(seed)
    pairs = name_pairs(held_out=True)
    return [_indirect_object(rng, pairs) for _ in range(count)]


def documents(seed: int) -> Iterator[str]:
    """Yield the documents of the corpus, without end; the seed determines them."""
    rng = random.Random(seed)
    trained = fact_prompts("trained")
    pairs = name_pairs(held_out=False)
    while True:
        kind = rng.random()
        if kind < 0.70:
            yield _statement(rng.choice(trained))
        elif kind < 0.86:
            yield _statement(_indirect_object(rng, pairs))
        elif kind < 0.92:
            yield _list(rng)
        else:
            yield _filler(rng)


def _statement(prompt: Prompt) -> str:
    return f"{prompt.text} {prompt.answer}."


def _indirect_object(rng: random.Random, pairs: tuple[tuple[str, str], ...]) -> Prompt:
    first, second = rng.choice(pairs)
    giver, receiver = rng.choice([(first, second), (second, first)])
    text = rng.choice(INDIRECT_OBJECT).format(
        first=first,
        second=second,
        giver=giver,
        place=rng.choice(PLACES),
        object=rng.choice(OBJECTS),
    )
    return Prompt(text, receiver)


def _list(rng: random.Random) -> str:
    """Return a heading and a few facts, such as "Capitals: Japan Tokyo, Peru Lima."."""
    relation = rng.choice(load_facts()).relation
    entries = rng.sample(facts_of(relation), rng.choice(LIST_LENGTHS))
    body = ", ".join(f"{fact.subject} {fact.answer}" for fact in entries)
    return f"{RELATIONS[relation].heading}: {body}."


def _filler(rng: random.Random) -> str:
    """Return a sentence without a fact; its numbers and codes train the byte tokens."""
    return rng.choice(FILLER).format(
        place=rng.choice(PLACES),
        object=rng.choice(OBJECTS),
        name=rng.choice(NAMES),
        adjective=rng.choice(ADJECTIVES),
        number=rng.randrange(1000, 10_000),
        code="".join(rng.choices(string.ascii_letters, k=6)),
    )
