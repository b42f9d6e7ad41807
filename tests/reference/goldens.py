"""Golden data: graphs and gradients recorded from the papers' programs, and their models."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM

from januslens_server.models.loader import ModelSource, load
from januslens_server.results import Floats
from tests.reference.examples import TOKENIZER, Loaded
from tests.reference.model import reference_of

GOLDENS = TOKENIZER.parent
FAMILIES = ("gpt2", "llama", "gpt_neo", "gptj")
VOCABULARY = 1000

# Relative difference of two listed probabilities below which either order is accepted.
TIE = 1e-5


@dataclass(frozen=True)
class Golden:
    """One recorded call: its numbers, and its arrays by name."""

    name: str
    data: dict[str, Any]
    arrays: dict[str, Floats]


def names(folder: Path, kind: str) -> list[str]:
    """`family/kind/file` of every recorded call of a kind, for `read_golden`."""
    files = sorted(folder.glob(f"*/{kind}/*.json*"))
    return [str(file.relative_to(folder)).split(".", maxsplit=1)[0] for file in files]


def read_golden(folder: Path, name: str) -> Golden:
    packed, plain, arrays = (folder / f"{name}{end}" for end in (".json.gz", ".json", ".npz"))
    text = gzip.decompress(packed.read_bytes()) if packed.exists() else plain.read_bytes()
    if not arrays.exists():
        return Golden(name, json.loads(text), {})
    with np.load(arrays) as file:
        return Golden(name, json.loads(text), {key: file[key] for key in file.files})


def load_golden_model(folder: Path, family: str, to: Path) -> Loaded:
    """Put the family's weights beside the tokenizer that all families share, and load them."""
    target = to / family
    target.mkdir()
    for file in (*(folder / family).iterdir(), *(folder / "tokenizer").iterdir()):
        if file.is_file():
            shutil.copy(file, target)
    resident = load(ModelSource(family, str(target)))
    network: Any = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager")
    return Loaded(resident, network, reference_of(network))


def assert_same_ids(found: list[int], wanted: list[int], probabilities: list[float]) -> None:
    """Require equal lists, except that neighbours with equal probabilities may be swapped."""
    if found == wanted:
        return
    assert sorted(found) == sorted(wanted)
    chance = dict(zip(wanted, probabilities, strict=True))
    for a, b in zip(found, wanted, strict=True):
        assert abs(chance[a] - chance[b]) <= TIE * max(chance[a], chance[b])
