"""What the demo model knows: subject, relation, answer, read from `facts.json`."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FACTS_FILE = Path(__file__).with_name("facts.json")


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact; the answer is one word, and one token with its leading space."""

    subject: str
    relation: str
    answer: str


@cache
def load_facts() -> tuple[Fact, ...]:
    """Every fact, table by table and column by column, in the file's order.

    A table's first column is the subject; every other column is a relation of that name.
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
    """The facts of one relation, in the file's order."""
    return tuple(fact for fact in load_facts() if fact.relation == relation)
