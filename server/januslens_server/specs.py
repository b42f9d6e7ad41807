"""Validated requests, in the model's own terms: what `rpc.decode` makes and `pipelines` run.

Defaults are VISIT's (Katz & Belinkov, 2023) for selection and the contract's for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from januslens_server.results import MatrixKind, NodeKind

Vectors = NDArray[np.float32]


class LensKind(IntEnum):
    """How a vector is brought into the vocabulary; numbers as in `lens.proto`."""

    FINAL_NORM = 1
    NORMALIZED = 2
    RAW = 3


@dataclass(frozen=True)
class LensSpec:
    """What of each projection is reported."""

    top_k: int = 5
    bottom_k: int = 5
    kind: LensKind = LensKind.FINAL_NORM


@dataclass(frozen=True)
class Selection:
    """How many parts of each sum become nodes; 0 means all, for `bottom_neurons` none."""

    heads: int = 10
    memory_values_per_head: int = 2
    top_neurons: int = 18
    bottom_neurons: int = 7


@dataclass(frozen=True)
class Text:
    """A prompt or target as text.

    `add_special_tokens` puts the tokenizer's special tokens before a prompt; targets never have
    them. `literal` reads the text's characters as characters, even where they spell a control
    token.
    """

    text: str
    add_special_tokens: bool = True
    literal: bool = False


# A prompt; a plain string stands for `Text(string)`.
Prompt = str | Text | tuple[int, ...]
# A target; a plain string stands for `Text(string)`.
Target = str | Text | tuple[int, ...]


@dataclass(frozen=True)
class TraceSpec:
    """One Trace request. Empty `layers` are all; empty `positions` are the last one."""

    prompt: Prompt
    target: Target | None = None
    layers: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    all_positions: bool = False
    selection: Selection = Selection()
    lens: LensSpec = LensSpec()
    node_kinds: frozenset[NodeKind] = frozenset()
    include_vectors: bool = False
    include_logit_contribution: bool = False
    overlap_k: int = 0
    include_checks: bool = False


@dataclass(frozen=True)
class ProjectSpec:
    """One Project request: `vectors` `[n, d_model]` of the residual basis."""

    vectors: Vectors
    lens: LensSpec = LensSpec()
    target: Target | None = None


@dataclass(frozen=True)
class FindNeuronsSpec:
    """One page of a FindNeurons request: up to `count` neurons from number `start` on.

    Empty `layers` are all.
    """

    token: Target
    suppressed: bool
    layers: tuple[int, ...]
    start: int
    count: int


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """-log p(target | prompt), several target tokens summed and teacher-forced."""

    target: Target


@dataclass(frozen=True)
class LogitDifference:
    """logit(other) - logit(preferred) at the last position."""

    preferred: Target
    other: Target


@dataclass(frozen=True)
class KlDivergence:
    """KL(p without the suppressed tokens, renormalised || p), the first argument held fixed."""

    suppressed: tuple[int, ...]


LossSpec = NegativeLogLikelihood | LogitDifference | KlDivergence


@dataclass(frozen=True)
class DescentStep:
    """One step of gradient descent on the target's NLL; empty `matrices` are FF1 and FF2."""

    matrices: tuple[MatrixKind, ...]
    layers: tuple[int, ...]
    learning_rate: float


@dataclass(frozen=True)
class ForwardShift:
    """`FF2 += eta x^T e` of one layer (Backward Lens, section 7)."""

    layer: int
    eta: float


@dataclass(frozen=True)
class Probe:
    """A further prompt to look at; without a target it watches the edit's."""

    label: str
    prompt: Prompt
    target: Target | None


@dataclass(frozen=True)
class PreviewEditSpec:
    """One PreviewEdit request."""

    prompt: Prompt
    target: Target
    edit: DescentStep | ForwardShift
    probes: tuple[Probe, ...] = ()


@dataclass(frozen=True)
class Span:
    """Token positions `start` to `end`, `end` excluded."""

    start: int
    end: int


@dataclass(frozen=True)
class GradientLensSpec:
    """One GradientLens request. Empty `layers` are all; empty `matrices` are FF1 and FF2."""

    prompt: Prompt
    loss: LossSpec
    matrices: tuple[MatrixKind, ...] = ()
    layers: tuple[int, ...] = ()
    lens: LensSpec = field(default_factory=LensSpec)
    components: int = 16
    spectrum_rank: int = 0
    neurons: int = 0
    learning_rate: float | None = None
    subject: str | Span | None = None
    include_factors: bool = False
    verify: bool = False
