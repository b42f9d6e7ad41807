"""Which neurons write a token."""

from __future__ import annotations

from dataclasses import dataclass

from januslens_server.results.arrays import Ints
from januslens_server.results.models import Provenance
from januslens_server.results.readings import ProjectionTable, Token


@dataclass(frozen=True)
class FoundNeurons:
    """One page of the neurons whose value promotes, or suppresses, `token`, best first.

    `layers`, `experts` (-1: none), `neurons` and `ranks` are `[n]`, the ranks counted from the end
    that was searched, `depth` tokens deep; `projections` has the token as its target. `total`
    counts the neurons of all pages.
    """

    token: Token
    layers: Ints
    experts: Ints
    neurons: Ints
    ranks: Ints
    projections: ProjectionTable
    depth: int
    total: int
    provenance: Provenance
