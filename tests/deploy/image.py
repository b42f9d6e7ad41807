"""Parse the parts of the Dockerfile that the tests need."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCKERFILE = Path(__file__).parents[2] / "deploy" / "Dockerfile"


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile, such as `COPY` with `client client`."""

    keyword: str
    rest: str


def instructions() -> list[Instruction]:
    """Return the Dockerfile's instructions, with continued lines joined and without comments."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    words = (line.split(maxsplit=1) for line in joined.splitlines() if line)
    return [Instruction(keyword, rest) for keyword, rest in words]


def end_image() -> list[Instruction]:
    """Return the instructions of the last stage, which defines the image."""
    found = instructions()
    start = max(i for i, instruction in enumerate(found) if instruction.keyword == "FROM")
    return found[start:]


def values(keyword: str) -> list[str]:
    """Return the arguments of each `keyword` instruction of the last stage."""
    return [item.rest for item in end_image() if item.keyword == keyword]


def value(keyword: str) -> str:
    """Return the arguments of the only `keyword` instruction of the last stage."""
    (found,) = values(keyword)
    return found


def environment() -> dict[str, str]:
    """Return the variables that the image sets."""
    return dict(pair.split("=", 1) for line in values("ENV") for pair in line.split())


def copied() -> list[tuple[str, str]]:
    """Return (source, destination) of everything copied from the repository, in any stage."""
    pairs = []
    for instruction in instructions():
        if instruction.keyword == "COPY" and not instruction.rest.startswith("--from"):
            *sources, destination = instruction.rest.split()
            pairs += [(source, destination) for source in sources]
    return pairs
