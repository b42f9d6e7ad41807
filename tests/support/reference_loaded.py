"""Every example as the server holds it, as plain Hugging Face runs it, and as the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from januslens_server.models.loading import ModelSource, load
from januslens_server.models.resident import ResidentModel
from tests.support.reference_examples import EXAMPLES
from tests.support.reference_families import reference_of
from tests.support.reference_model import ReferenceModel


@dataclass(frozen=True)
class Loaded:
    """One model three times; `network` is an instance of its own, with eager attention."""

    resident: ResidentModel
    network: Any
    reference: ReferenceModel


LoadExample = Callable[[str], Loaded]


def load_example_in(folder: Path, name: str) -> Loaded:
    """Save the example as an ordinary folder and load it as the server does."""
    example = EXAMPLES[name]
    resident = load(ModelSource(name, str(example.save(folder))))
    network = example.build()
    return Loaded(resident, network, reference_of(network))
