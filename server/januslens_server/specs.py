"""Decoded and validated requests, independent of protobuf; `rpc.decode` creates them.

The defaults of `Selection` are those of VISIT (Katz & Belinkov, 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from januslens_server.results import MatrixKind, NodeKind

Vectors = NDArray[np.float32]


class LensKind(IntEnum):
    """Variants of the logit lens; numbers as in `lens.proto`."""

    FINAL_NORM = 1
    NORMALIZED = 2
    RAW = 3


class Site(IntEnum):
    """Places of a forward pass whose tensors can be read; numbers as in `sites.proto`."""

    EMBEDDING = 1
    ATTENTION_INPUT = 2
    QUERY = 3
    KEY = 4
    VALUE = 5
    ATTENTION_PATTERN = 6
    HEAD_RESULT = 7
    ATTENTION_OUTPUT = 8
    RESIDUAL_MID = 9
    MLP_INPUT = 10
    NEURONS = 11
    ROUTER = 12
    MLP_OUTPUT = 13
    BLOCK_OUTPUT = 14
    FINAL_NORM = 15
    LOGITS = 16
    MIXER_OUTPUT = 17


@dataclass(frozen=True)
class LensSpec:
    """The lens, and how many top and bottom tokens each projection reports."""

    top_k: int = 5
    bottom_k: int = 5
    kind: LensKind = LensKind.FINAL_NORM


class Criterion(IntEnum):
    """Scores by which parts are selected; numbers as in `trace.proto`."""

    VISIT = 1
    CONTRIBUTION = 2
    ATTRIBUTION = 3


class Unit(NamedTuple):
    """A head or a neuron of a layer; `expert` is None outside of mixtures."""

    layer: int
    number: int
    expert: int | None = None


class HeadSource(NamedTuple):
    """A position that a head of a layer attends to."""

    layer: int
    head: int
    position: int


@dataclass(frozen=True)
class Selection:
    """How many parts of each sum become nodes, and by which score.

    0 means all, but none for `bottom_neurons`. `only_heads`, `only_neurons` and `only_sources`
    replace the selection by score unless they are empty.
    """

    heads: int = 10
    memory_values_per_head: int = 2
    top_neurons: int = 18
    bottom_neurons: int = 7
    by: Criterion = Criterion.VISIT
    only_heads: tuple[Unit, ...] = ()
    only_neurons: tuple[Unit, ...] = ()
    only_sources: tuple[HeadSource, ...] = ()

    @property
    def named_heads(self) -> frozenset[tuple[int, int]]:
        """Layer and number of the named heads, including those whose sources are named."""
        heads = {(unit.layer, unit.number) for unit in self.only_heads}
        return frozenset(heads.union((named.layer, named.head) for named in self.only_sources))

    def heads_of(self, layer: int) -> list[int] | None:
        """Return the heads named for a layer, ascending; None if heads are selected by score."""
        named = self.named_heads
        return sorted(head for at, head in named if at == layer) if named else None

    def sources_of(self, layer: int) -> dict[int, list[int]] | None:
        """Return the sources named for each head of a layer; None if they are selected by score."""
        if not self.only_sources:
            return None
        found: dict[int, list[int]] = {}
        for named in dict.fromkeys(self.only_sources):
            if named.layer == layer:
                found.setdefault(named.head, []).append(named.position)
        return found

    def neurons_of(self, layer: int) -> list[Unit] | None:
        """Return the neurons named for a layer; None if neurons are selected by score."""
        if not self.only_neurons:
            return None
        return [unit for unit in dict.fromkeys(self.only_neurons) if unit.layer == layer]


@dataclass(frozen=True)
class Text:
    """A prompt or target as text.

    `add_special_tokens` adds the tokenizer's initial special tokens to a prompt; targets never get
    them. `literal` reads characters that spell a control token as ordinary text.
    """

    text: str
    add_special_tokens: bool = True
    literal: bool = False


@dataclass(frozen=True)
class ChatMessage:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """A conversation as a prompt: the model continues the last message or begins the next one."""

    messages: tuple[ChatMessage, ...]
    continue_final_message: bool = False


# A prompt; a plain string means `Text(string)`.
Prompt = str | Text | Chat | tuple[int, ...]


def loggable(prompt: Prompt) -> object:
    """Return a prompt as a value for the log."""
    if isinstance(prompt, Chat):
        return [(message.role, message.content) for message in prompt.messages]
    return prompt.text if isinstance(prompt, Text) else prompt


# A target; a plain string means `Text(string)`.
Target = str | Text | tuple[int, ...]


@dataclass(frozen=True)
class TraceSpec:
    """One Trace request. Empty `layers` means all; empty `positions` means the last one."""

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
    include_projections: bool = True
    interventions: tuple[InterventionSpec, ...] = ()
    other: Target | None = None
    include_attribution: bool = False
    include_gradients: bool = False
    targets_at: tuple[tuple[int, Target], ...] = ()
    next_token_targets: bool = False

    @property
    def contributes(self) -> bool:
        """Whether parts have logit contributions."""
        return self.include_logit_contribution or self.selection.by is Criterion.CONTRIBUTION

    @property
    def attributes(self) -> bool:
        """Whether parts have attributions."""
        return self.include_attribution or self.selection.by is Criterion.ATTRIBUTION

    @property
    def differentiates(self) -> bool:
        """Whether the trace needs a backward pass."""
        return self.attributes or self.include_gradients

    @property
    def keeps_vectors(self) -> bool:
        """Whether the nodes' vectors are needed, and not only their norms."""
        return self.include_projections or self.include_vectors


@dataclass(frozen=True)
class Zero:
    """The values become 0."""


@dataclass(frozen=True)
class Scale:
    """The values are multiplied."""

    factor: float


@dataclass(frozen=True)
class SetTo:
    """The values become `values`, of the site's shape at one position or at each of several."""

    values: Vectors


@dataclass(frozen=True)
class Add:
    """`coefficient * vector` is added; the vector is shaped as in `SetTo`."""

    vector: Vectors
    coefficient: float = 1.0


@dataclass(frozen=True)
class PatchFrom:
    """The values become those of another prompt's pass; empty `positions` means the same ones."""

    prompt: Prompt
    positions: tuple[int, ...] = ()


@dataclass(frozen=True)
class MeanOver:
    """The values become the mean over the passes of other prompts."""

    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class Noise:
    """Normally distributed noise is added."""

    standard_deviation: float
    seed: int


@dataclass(frozen=True)
class BlockSources:
    """The sources are hidden from the queries."""


Operation = Zero | Scale | SetTo | Add | PatchFrom | MeanOver | Noise | BlockSources


@dataclass(frozen=True)
class InterventionSpec:
    """One change of a forward pass. Empty `layers` means every layer that has the site.

    Other empty fields mean all. `neurons` and `experts` apply to NEURONS, and `sources` to
    ATTENTION_PATTERN.
    """

    site: Site
    operation: Operation
    layers: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    neurons: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()


@dataclass(frozen=True)
class ActivationsSpec:
    """One Activations request.

    Empty `layers` means every layer that has the site; empty `positions`, `heads` and `experts`
    mean all.
    """

    prompt: Prompt
    sites: tuple[Site, ...]
    layers: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    float32: bool = False
    interventions: tuple[InterventionSpec, ...] = ()
    experts: tuple[int, ...] = ()


@dataclass(frozen=True)
class SweepSpec:
    """Experiments that split `template` along the chosen axes."""

    template: InterventionSpec
    by_layer: bool = False
    by_position: bool = False
    by_unit: bool = False
    by_source: bool = False
    layer_window: int = 1


@dataclass(frozen=True)
class ExperimentSpec:
    """Interventions that apply to the same pass."""

    label: str
    interventions: tuple[InterventionSpec, ...]


@dataclass(frozen=True)
class InterveneSpec:
    """One Intervene request. Empty `positions` means the last one."""

    prompt: Prompt
    target: Target | None = None
    other: Target | None = None
    experiments: tuple[ExperimentSpec, ...] = ()
    sweep: SweepSpec | None = None
    always: tuple[InterventionSpec, ...] = ()
    positions: tuple[int, ...] = ()
    top_k: int = 5


@dataclass(frozen=True)
class ProjectSpec:
    """One Project request; `vectors` `[n, d_model]` are in the residual basis."""

    vectors: Vectors
    lens: LensSpec = LensSpec()
    target: Target | None = None


@dataclass(frozen=True)
class FindNeuronsSpec:
    """One page of a FindNeurons request: up to `count` neurons, starting with number `start`.

    Empty `layers` means all.
    """

    token: Target
    suppressed: bool
    layers: tuple[int, ...]
    start: int
    count: int


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; a temperature of 0 means greedily, 0 elsewhere means no restriction."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class LayerReading:
    """The layers to read at each step, and the tokens to list of each; empty `layers` means all."""

    layers: tuple[int, ...] = ()
    top_k: int = 1


@dataclass(frozen=True)
class GenerateSpec:
    """A Generate request; without a `reading` no layer is read."""

    prompt: Prompt
    max_new_tokens: int = 64
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    top_k: int = 5
    reading: LayerReading | None = None
    interventions: tuple[InterventionSpec, ...] = ()


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """-log p(target | prompt); for several target tokens the sum, with teacher forcing."""

    target: Target


@dataclass(frozen=True)
class LogitDifference:
    """logit(other) - logit(preferred) at the last position."""

    preferred: Target
    other: Target


# Maximum number of suppressed tokens, because every component reports the rank of each.
MAX_SUPPRESSED = 256


@dataclass(frozen=True)
class KlDivergence:
    """KL(q || p), where q is p without the suppressed tokens, renormalised and held fixed."""

    suppressed: tuple[int, ...]
    tokens: tuple[Target, ...] = ()


LossSpec = NegativeLogLikelihood | LogitDifference | KlDivergence


@dataclass(frozen=True)
class DescentStep:
    """One step of gradient descent on the target's NLL; empty `matrices` means FF1 and FF2."""

    matrices: tuple[MatrixKind, ...]
    layers: tuple[int, ...]
    learning_rate: float


@dataclass(frozen=True)
class ForwardShift:
    """The edit `FF2 += eta x^T e` in one layer (Backward Lens, section 7).

    `gradient_cosine` asks for the cosine of the edit and a descent step.
    """

    layer: int
    eta: float
    gradient_cosine: bool = False


@dataclass(frozen=True)
class Probe:
    """A further prompt to report; without a target, the edit's target is used."""

    label: str
    prompt: Prompt
    target: Target | None


@dataclass(frozen=True)
class EditGrid:
    """One edit for each layer and each strength; empty `layers` means all."""

    layers: tuple[int, ...]
    strengths: tuple[float, ...]


@dataclass(frozen=True)
class PreviewEditSpec:
    """One PreviewEdit request; a `grid` replaces the layers and the strength of its edit."""

    prompt: Prompt
    target: Target
    edit: DescentStep | ForwardShift
    probes: tuple[Probe, ...] = ()
    interventions: tuple[InterventionSpec, ...] = ()
    grid: EditGrid | None = None

    @property
    def takes_gradient(self) -> bool:
        """Whether the edit, or what is reported of it, takes a backward pass."""
        return isinstance(self.edit, DescentStep) or self.edit.gradient_cosine


@dataclass(frozen=True)
class Span:
    """Token positions from `start` to `end`, excluding `end`."""

    start: int
    end: int


@dataclass(frozen=True)
class GradientLensSpec:
    """One GradientLens request. Empty `layers` means all.

    Empty `matrices` means FF1 and FF2, or none if there are `modules`: names of linear maps, in
    which `*` stands for any characters.
    """

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
    interventions: tuple[InterventionSpec, ...] = ()
    include_attention_gradients: bool = False
    modules: tuple[str, ...] = ()
