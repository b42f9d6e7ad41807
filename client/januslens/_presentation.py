"""Format results for people: numbers, names, sentences, colours and steps.

The command and the notebook use this module. The pages implement the same rules in TypeScript;
tests/fixtures/presentation/ tests both implementations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from januslens.results.kinds import Criterion, End, MatrixKind, NodeKind, Side

if TYPE_CHECKING:
    from januslens.results.contributions import ContributionTree
    from januslens.results.gradient import Gradient
    from januslens.results.graph import Node, Part
    from januslens.results.intervene import Prediction
    from januslens.results.matrices import Matrix
    from januslens.results.models import LayerLevel, Model, Provenance, Waiting
    from januslens.results.tokens import Token
    from januslens.results.trace import LayerGraph, PositionTarget, Trace

# ---- Numbers ----------------------------------------------------------------------------------


NOT_FINITE = "not finite"


def probability(value: float, logarithm: float | None = None) -> str:
    """Format a probability: three decimals, or one digit if those are zero: `0.992`, `8e-10`.

    A probability that underflows is shown as a power of e, if its logarithm is known: `e^-118`.
    """
    if not math.isfinite(value):
        return NOT_FINITE
    if value == 0 and logarithm is not None and math.isfinite(logarithm):
        return f"e^{logarithm:.0f}"
    return f"{value:.3f}" if value >= 0.0005 or value == 0 else f"{value:.0e}"


def signed(value: float, digits: int = 2) -> str:
    """Format a number with its sign, below a million with some decimals: `+1.50`, `+1.23e+06`."""
    if abs(value) >= _LARGE or math.isnan(value):
        return f"{'+' if value > 0 else ''}{measure(value)}" if math.isfinite(value) else NOT_FINITE
    rounded = f"{value:+.{digits}f}"
    return f"{0:+.{digits}f}" if float(rounded) == 0 else rounded


def percent(share: float) -> str:
    """Format a share of a sum; smaller ones have more decimals: `43 %`, `-3.1 %`, `0.05 %`."""
    if not math.isfinite(share):
        return NOT_FINITE
    size = abs(100 * share)
    if size < 0.005:
        return "0 %"
    if size >= _LARGE:
        return f"{measure(100 * share)} %"
    digits = 0 if size >= 9.95 else 1 if size >= 0.095 else 2
    return f"{'-' if share < 0 else ''}{size:.{digits}f} %"


def measure(value: float, digits: int = 3) -> str:
    """Format a norm or another figure with `digits` significant digits: `21.7`, `6.05e-05`."""
    if not math.isfinite(value):
        return NOT_FINITE
    scientific = f"{value:.{digits - 1}e}"
    rounded = float(scientific)
    if rounded == 0:
        return "0"
    if 1e-4 <= abs(rounded) < _LARGE:
        return f"{rounded:.10f}".rstrip("0").rstrip(".")
    mantissa, exponent = scientific.split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"


_LARGE = 1e6  # larger figures are in scientific notation


def count(value: int) -> str:
    """Format a whole number with thin spaces between thousands: `50 257`."""
    return f"{value:,}".replace(",", "\u2009")


# ---- Levels -----------------------------------------------------------------------------------


def level_sentences(levels: Sequence[LayerLevel]) -> list[str]:
    """Describe what is shown of layers below the level PARTS, and why not all parts are.

    Layers that show the same share a sentence, with the reason of the first of them:
    `layers 0 to 3, 5: residual stream, mlp (MLP) only (...)`.
    """
    layers: dict[str, list[LayerLevel]] = {}
    for found in levels:
        if found.level != "PARTS":
            layers.setdefault(_shown_parts(found), []).append(found)
    return [
        f"layer{'s' if len(each) > 1 else ''} {_ranges([found.layer for found in each])}: "
        f"{shown} only ({each[0].reason})"
        for shown, each in layers.items()
    ]


def _shown_parts(level: LayerLevel) -> str:
    """Name what is shown of a layer: `residual stream, mamba (state space), mlp (MLP)`."""
    sublayers = (
        f"{each.module} ({_SUBLAYERS.get(each.kind, each.kind.lower())})"
        for each in level.sublayers
    )
    return ", ".join(["residual stream", *sublayers])


_SUBLAYERS = {
    "ATTENTION": "attention",
    "LINEAR_ATTENTION": "linear attention",
    "STATE_SPACE": "state space",
    "CONVOLUTION": "convolution",
    "MLP": "MLP",
    "EXPERTS": "experts",
    "OTHER": "another mixer",
}


def _ranges(numbers: Sequence[int]) -> str:
    """Format ascending numbers, three or more consecutive ones as a range: `0 to 3, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = (f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return ", ".join(texts)


# ---- Bins and colours -------------------------------------------------------------------------

RANK_BINS = ("top", "< 10", "< 100", "< 1k", "middle", "last 1k", "last 100")


def promotion_rank(rank: float, promoted: End, vocabulary: int) -> float:
    """Return a rank counted from the end of a projection that a descent step promotes."""
    return vocabulary - 1 - rank if promoted is End.BOTTOM and vocabulary else rank


def rank_bin(rank: int | None, vocabulary: int | None = None) -> str:
    """Return the name of a rank's bin; `middle` if there is no rank.

    A small vocabulary has no middle bin, so a rank belongs to the nearer end. If the size of the
    vocabulary is unknown, the bins of the last ranks are not used.
    """
    if rank is None:
        return "middle"
    if vocabulary is not None and vocabulary - 1 - rank < rank:
        from_end = vocabulary - 1 - rank
        return "last 100" if from_end < 100 else "last 1k" if from_end < 1000 else "middle"
    near = ((1, "top"), (10, "< 10"), (100, "< 100"), (1000, "< 1k"))
    return next((name for limit, name in near if rank < limit), "middle")


Rgb = tuple[int, int, int]
_NORM_COLOURS: tuple[Rgb, ...] = (
    (245, 236, 222),
    (244, 199, 160),
    (231, 147, 124),
    (181, 83, 120),
    (94, 42, 104),
)


_FAR = 2  # times the largest norm of the other positions


def norm_limit(norms: Iterable[tuple[int, float]], prompt: Sequence[Token]) -> tuple[float, str]:
    """Return the end of the scale of norms by position, and a note on a position beyond it.

    One position other than the last that is far beyond all others, such as the attention sink, does
    not set the end: `(33.0, "<bos> (0) up to 317")`.
    """
    largest: dict[int, float] = {}
    for position, norm in norms:
        if math.isfinite(norm):
            largest[position] = max(largest.get(position, 0.0), norm)
    ranked = sorted(largest.items(), key=lambda item: item[1], reverse=True)
    position, value = ranked[0] if ranked else (0, 0.0)
    second = ranked[1][1] if len(ranked) > 1 else 0.0
    if position != len(prompt) - 1 and 0 < _FAR * second < value:
        return second, f"{token_at(position, prompt)} up to {measure(value)}"
    return value, ""


def norm_part(norm: float, largest: float) -> float:
    """Return a norm's place, 0 to 1, on a square-root scale from 0 to the largest norm."""
    return math.sqrt(min(1.0, max(0.0, norm / largest))) if largest > 0 else 0.0


def norm_colour(norm: float, largest: float) -> Rgb:
    """Return the background colour of a norm, from cream to plum."""
    place = norm_part(norm, largest) * (len(_NORM_COLOURS) - 1)
    below = min(int(place), len(_NORM_COLOURS) - 2)
    low, high = _NORM_COLOURS[below], _NORM_COLOURS[below + 1]
    red, green, blue = (
        # Round half up, as JavaScript does.
        math.floor(a + (b - a) * (place - below) + 0.5)
        for a, b in zip(low, high, strict=True)
    )
    return red, green, blue


# From decreases to increases, and a neutral colour between them.
_DECREASE: Rgb = (32, 92, 156)
_NEUTRAL: Rgb = (247, 246, 243)
_INCREASE: Rgb = (172, 62, 28)


def change_colour(change: float, largest: float) -> Rgb:
    """Return the background colour of a change: blue for decreases, red for increases.

    The scale is that of norms, from 0 to the largest absolute change.
    """
    place = norm_part(abs(change), largest)
    end = _DECREASE if change < 0 else _INCREASE
    red, green, blue = (
        round(low + (high - low) * place) for low, high in zip(_NEUTRAL, end, strict=True)
    )
    return red, green, blue


def ink_on(colour: Rgb) -> Rgb:
    """Return black or white, whichever has more contrast (WCAG 2.2, relative luminance)."""
    red, green, blue = (_linear(part / 255) for part in colour)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    black = (luminance + 0.05) ** 2 > 1.05 * 0.05
    return (0, 0, 0) if black else (255, 255, 255)


def _linear(part: float) -> float:
    return part / 12.92 if part <= 0.04045 else float(((part + 0.055) / 1.055) ** 2.4)


# ---- Names ------------------------------------------------------------------------------------

NODE_NAMES = {
    NodeKind.BLOCK_INPUT: "embedding",
    NodeKind.ATTENTION_INPUT: "attention's input",
    NodeKind.QUERY: "query",
    NodeKind.KEY: "key",
    NodeKind.VALUE: "value",
    NodeKind.HEAD_QUERY: "query",
    NodeKind.HEAD_KEY: "key",
    NodeKind.HEAD_VALUE: "value",
    NodeKind.MEMORY_KEY: "key",
    NodeKind.MEMORY_VALUE: "value",
    NodeKind.HEAD_OUTPUT: "output",
    NodeKind.ATTENTION_CONCAT: "all heads together",
    NodeKind.ATTENTION_NEURON: "row of W_O",
    NodeKind.ATTENTION_BIAS: "attention's bias",
    NodeKind.ATTENTION_SUM: "attention's raw result",
    NodeKind.ATTENTION_OUTPUT: "attention's result",
    NodeKind.RESIDUAL_MID: "residual after attention",
    NodeKind.MLP_INPUT: "MLP's input",
    NodeKind.MLP_KEY: "key",
    NodeKind.MLP_UP: "up column",
    NodeKind.MLP_VALUE: "value",
    NodeKind.MLP_BIAS: "MLP's bias",
    NodeKind.MLP_SUM: "MLP's raw result",
    NodeKind.MLP_OUTPUT: "MLP's result",
    NodeKind.BLOCK_OUTPUT: "residual after the block",
    NodeKind.FINAL_NORM: "after the final norm",
    NodeKind.PREDICTION: "prediction",
    NodeKind.OTHER: "all the rest",
    NodeKind.MIXER_OUTPUT: "mixer's result",
    NodeKind.MIXER_HEAD: "of the mixer",
}


def node_name(node: Node, prompt: Sequence[Token]) -> str:
    """Name a node without its query position, for example `L2 head 3 value of ␣Japan (3)`."""
    parts = [_numbered(node), NODE_NAMES.get(node.kind, str(node.kind).lower())]
    source = node.position if node.kind is NodeKind.BLOCK_INPUT else node.source_position
    if source is not None:
        parts.append(f"of {token_at(source, prompt)}")
    return " ".join(part for part in parts if part)


def _numbered(node: Node) -> str:
    """Name a head or neuron: `L2 head 3` or `L2 expert 1 neuron 7`."""
    parts = [] if node.layer is None else [f"L{node.layer}"]
    for name, number in (("head", node.head), ("expert", node.expert), ("neuron", node.neuron)):
        if number is not None:
            parts.append(f"{name} {number}")
    return " ".join(parts)


def token_at(position: int, prompt: Sequence[Token]) -> str:
    """Name a token of the prompt with its position: `␣Japan (3)`."""
    return f"{prompt[position]} ({position})" if position < len(prompt) else f"({position})"


def model_name(provenance: Provenance) -> str:
    """Describe a model: name, architecture, weights, 12 characters of the revision."""
    return (
        f"{provenance.model} ({provenance.architecture}, {weights(provenance)}), "
        f"revision {provenance.revision[:12]}"
    )


def weights(provenance: Provenance) -> str:
    """Describe weights: their data type, device and, if any, stored format and LoRA."""
    stored = f", from {provenance.quantization}" if provenance.quantization else ""
    changed = f", with a LoRA of {provenance.lora}" if provenance.lora else ""
    return f"{provenance.data_type} on {provenance.device}{stored}{changed}"


def loading_step(model: Model) -> str:
    """Describe how far a LOADING model is: `42 %`, or `checking` when its weights are read."""
    if model.loaded_fraction >= 1:
        return "checking"
    return f"{math.floor(100 * model.loaded_fraction)} %"


def checks(model: Model) -> str:
    """Summarize the self-check: `4 checks passed`, or `failed:` and names; empty without checks."""
    failed = [guarantee.name for guarantee in model.guarantees if not guarantee.held]
    if failed:
        return f"failed: {', '.join(failed)}"
    number = len(model.guarantees)
    return f"{number} check{'' if number == 1 else 's'} passed" if number else ""


def waiting_line(waiting: Waiting) -> str:
    """Describe the place of a request that waits: `waiting: 3 requests ahead, about 12 s`."""
    number = waiting.requests_ahead
    requests = f"{number} request{'' if number == 1 else 's'} ahead"
    seconds = math.ceil(waiting.expected_seconds)
    return f"waiting: {requests}, about {seconds} s" if seconds > 0 else f"waiting: {requests}"


def written_tokens(node: Node) -> tuple[Token, ...]:
    """Return the tokens that a node promotes: its bottom tokens if its factor is negative."""
    if node.projection is None:
        return ()
    negative = (node.activation or 0.0) < 0
    return node.projection.bottom_tokens if negative else node.projection.top_tokens


# ---- Sentences --------------------------------------------------------------------------------

# Texts and tokens in order. Renderers may emphasise the tokens; `plain` returns only the text.
Sentence = tuple["str | Token", ...]


def plain(sentence: Sentence) -> str:
    """Return the sentence as text, with visible signs for spaces and controls in tokens."""
    return "".join(str(part) for part in sentence)


def figure_name(trace: Trace) -> str:
    """Name the figure that contributions add up to: `logit`, or `logit difference`."""
    return "logit" if trace.header.other is None else "logit difference"


def trace_sentences(trace: Trace, target: PositionTarget) -> list[Sentence]:
    """State the target, the layer from which it ranks first, and its strongest head and neuron."""
    sentences = [target_sentence(trace, target), (emergence_sentence(trace, target),)]
    by_contribution = trace.header.selected_by is Criterion.CONTRIBUTION
    for name, kind in (("heads", NodeKind.HEAD_OUTPUT), ("neurons", NodeKind.MLP_VALUE)):
        parts = trace.parts_of_kind(kind, target.position)
        added = [part for part in parts if _is_finite(part.logit_contribution)]
        if added:
            best = max(added, key=lambda part: part.logit_contribution or 0.0)
            among = "" if by_contribution else f" of the selected {name}"
            sentences.append((_contribution_sentence(trace, best, among),))
    return sentences


def target_sentence(trace: Trace, target: PositionTarget) -> Sentence:
    """State the target's rank and probability, and the model's prediction.

    For example "␣Paris after ␣of (7): rank 3, probability 0.020; the model predicts ␣Tokyo."
    """
    place = f" after {token_at(target.position, trace.prompt_tokens)}: "
    figure = f"probability {probability(target.target_probability, target.target_log_probability)}"
    if target.logit_difference is not None:
        figure += f", logit difference {signed(target.logit_difference)} to {trace.header.other}"
    if target.target_rank == 0:
        return target.target, f"{place}the model's own prediction, {figure}."
    ranked = f"{place}rank {target.target_rank}, {figure}; the model predicts "
    return target.target, ranked, target.predicted, "."


def prediction_sentence(before: Prediction, prompt: Sequence[Token]) -> Sentence:
    """State the target's rank and probability in the pass without interventions."""
    place = f" after {token_at(before.position, prompt)}: "
    figure = f"probability {probability(before.probability)}"
    if before.logit_difference is not None:
        figure += f", logit difference {signed(before.logit_difference)}"
    if before.rank == 0:
        return before.target, f"{place}the model's own prediction, {figure}."
    end: Sentence = ("; the model predicts ", before.top[0][0], ".") if before.top else (".",)
    return before.target, f"{place}rank {before.rank}, {figure}", *end


def emergence_sentence(trace: Trace, target: PositionTarget) -> str:
    """State from which residual onwards the target ranks first, or else its best rank."""
    ranked = [(step, _rank(step)) for step in all_residual_steps(trace, target.position)]
    steps = [step for step, rank in ranked if rank is not None]
    ranks = [rank for _, rank in ranked if rank is not None]
    if not steps:
        return "No residual of this position was traced."
    later = max((i for i, rank in enumerate(ranks) if rank != 0), default=-1)
    if later + 1 < len(steps):
        return f"Ranked first from {steps[later + 1].place} onwards."
    best = steps[ranks.index(min(ranks))]
    return f"Best rank {min(ranks)} after {best.place}; final rank {ranks[-1]}."


def _rank(step: ResidualStep) -> int | None:
    return step.node.projection.target_rank if step.node.projection else None


def _contribution_sentence(trace: Trace, part: Part, among: str) -> str:
    added = signed(part.logit_contribution or 0.0)
    text = f"{_numbered(part.node)} adds most{among}: {added} to its {figure_name(trace)}"
    # OTHER stands for several sources, so it has attention but no position.
    sources = [
        (source.node.source_position, source.attention)
        for source in trace.parts_of(part.node)
        if source.node.source_position is not None and _is_finite(source.attention)
    ]
    if sources:
        position, attention = max(sources, key=lambda source: source[1] or 0.0)
        place = token_at(position, trace.prompt_tokens)
        text += f", reading {place} with attention {attention:.2f}"
    return f"{text}."


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def loss_sentence(gradient: Gradient, *, likelihood: bool = False) -> Sentence:
    """State the loss, its targets and the model's prediction.

    For example "Loss 1.25 for ␣c, probability 0.287; the model predicts ␣d."

    Only a negative log likelihood corresponds to a probability. A gradient does not record which
    loss it has, so the caller sets `likelihood`.
    """
    sentence: list[str | Token] = [f"Loss {measure(gradient.loss, 4)}"]
    if gradient.header.targets:
        sentence += [" for ", *gradient.header.targets]
    if likelihood:
        sentence.append(f", probability {probability(math.exp(-gradient.loss))}")
    return (*sentence, "; the model predicts ", gradient.header.predicted, ".")


def factor_title(matrix: Matrix) -> str:
    """Title a matrix's projected factors, for example `FF1: tokens of x, its input`."""
    if matrix.projected_side is Side.INPUT:
        return f"{matrix.kind}: tokens of x, its input"
    if matrix.projected_side is Side.UNSPECIFIED:
        return f"{matrix.kind}: neither its input nor its output is in the residual basis"
    return f"{matrix.kind}: tokens of δ, the gradient of its output"


def kinds_of(gradient: Gradient) -> list[MatrixKind | str]:
    """Return the kinds of a gradient's matrices, then its modules in the order received."""
    order: dict[MatrixKind | str, int] = {kind: i for i, kind in enumerate(MatrixKind)}
    kinds = dict.fromkeys(matrix.kind for matrix in gradient.matrices)
    return sorted(kinds, key=lambda kind: order.get(kind, len(order)))


# ---- Steps through a trace --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ResidualStep:
    """The residual stream after one addition to it.

    Attributes:
        layer: The layer.
        name: What was added, or `input` for a residual that no traced block made.
        place: The step's name in a sentence: `the embedding`, `layer 3's attention`.
        node: The residual after the step.
        contribution: What the added parts contribute to the target's logit together; None for
            `input`, and without contributions.
    """

    layer: int
    name: str
    place: str
    node: Node
    contribution: float | None


def all_residual_steps(trace: Trace, position: int) -> Iterator[ResidualStep]:
    """Return the residual steps of all layers at one position, lowest layer first."""
    for layer in trace.layers:
        yield from residual_steps(trace, layer, position)


def residual_steps(trace: Trace, layer: LayerGraph, position: int) -> Iterator[ResidualStep]:
    """Return the residual steps of one layer: input, after attention, after the MLP.

    The input is left out if it is the last step of the layer below. Attention and MLP are one step
    if they are parallel, or if the trace does not have the residual between them. A step of which
    the trace has all parts, or of a layer without all parts, is named after the parts that are
    shown; without any, `block`.
    """
    mids = layer.nodes_of(NodeKind.RESIDUAL_MID, position)
    outputs = layer.nodes_of(NodeKind.BLOCK_OUTPUT, position)
    gaps = [node for node in outputs if node.layer != layer.layer]
    for node in [*layer.nodes_of(NodeKind.BLOCK_INPUT, position), *gaps]:
        place = "the embedding" if node.layer is None else f"layer {node.layer}"
        yield ResidualStep(layer.layer, "input", place, node, None)
    attention, mlp = NodeKind.ATTENTION_OUTPUT, NodeKind.MLP_OUTPUT
    steps = [(node, [attention]) for node in mids]
    own = [node for node in outputs if node.layer == layer.layer]
    steps += [(node, [mlp] if mids else [attention, mlp]) for node in own]
    limited = any(level.layer == layer.layer for level in trace.header.limited_layers)
    for node, usual in steps:
        parts = {part.node.kind: part for part in trace.parts_of(node)}
        added = [kind for kind in _ADDED if kind in parts]
        whole = bool(added) and not _BEFORE.isdisjoint(parts)
        named = limited or whole or NodeKind.MIXER_OUTPUT in added
        kinds = added if named else usual
        name = " and ".join(_ADDED[kind] for kind in kinds) or "block"
        place = f"layer {layer.layer}'s {name}"
        known = added if set(kinds) <= set(added) else []
        contribution = _sum(parts[kind].logit_contribution for kind in known)
        yield ResidualStep(layer.layer, f"+ {name}", place, node, contribution)


def _sum(values: Iterable[float | None]) -> float | None:
    """Add the values that are known; None without any."""
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None


# The residual before a block. A step that has it as a part has all its parts in the trace.
_BEFORE = {NodeKind.BLOCK_INPUT, NodeKind.BLOCK_OUTPUT}

# What sublayers are called, in the order of the pass.
_ADDED = {
    NodeKind.ATTENTION_OUTPUT: "attention",
    NodeKind.MIXER_OUTPUT: "mixer",
    NodeKind.MLP_OUTPUT: "MLP",
}


@dataclass(frozen=True, slots=True)
class FoldedSteps:
    """Consecutive residual steps that a table shows as one line.

    Attributes:
        steps: The steps, lowest layer first.
        contribution: The sum of what they add to the target's logit; None without contributions.
    """

    steps: tuple[ResidualStep, ...]
    contribution: float | None

    @property
    def layers(self) -> str:
        """The layers of the steps: `3-21`."""
        ends = (self.steps[0].layer, self.steps[-1].layer)
        return "-".join(str(layer) for layer in dict.fromkeys(ends))

    @property
    def ranks(self) -> str:
        """The smallest and the largest rank of the target: `4122 to 13616`."""
        found = [rank for step in self.steps if (rank := _rank(step)) is not None]
        ends = (min(found), max(found)) if found else ()
        return " to ".join(str(rank) for rank in dict.fromkeys(ends))


_DULL = 3  # fewer steps are not folded


def folded_steps(
    steps: Sequence[ResidualStep], at_most: int
) -> Iterator[ResidualStep | FoldedSteps]:
    """Fold the steps that add little to the target's logit; the first and the last remain.

    `at_most` steps between them remain: those with the largest absolute contributions or, without
    contributions, with the largest changes of the target's rank, as a ratio.
    """
    sizes = [_step_size(steps[i - 1], step) for i, step in enumerate(steps)]
    inner = sorted(range(1, len(steps) - 1), key=lambda i: -sizes[i])
    kept = {0, len(steps) - 1, *inner[:at_most]}
    for is_kept, run in groupby(range(len(steps)), key=kept.__contains__):
        places = list(run)
        if is_kept or len(places) < _DULL:
            yield from (steps[i] for i in places)
        else:
            dull = tuple(steps[i] for i in places)
            yield FoldedSteps(dull, _sum(step.contribution for step in dull))


def _step_size(before: ResidualStep, step: ResidualStep) -> float:
    if step.contribution is not None:
        return abs(step.contribution)
    first, second = _rank(before), _rank(step)
    return 0.0 if first is None or second is None else abs(math.log((first + 1) / (second + 1)))


@dataclass(frozen=True, slots=True)
class ContributionLine:
    """One line of a contribution tree.

    Attributes:
        depth: 0 for the root.
        name: The name of the node, or `rest`.
        contribution: The contribution to the target's logit.
        part: The node's part of the tree; None for a rest.
    """

    depth: int
    name: str
    contribution: float
    part: ContributionTree | None


def contribution_lines(
    tree: ContributionTree, trace: Trace, depth: int = 0
) -> Iterator[ContributionLine]:
    """Return the lines of `trace.why()`; the rest of a node follows its listed parts."""
    name = node_name(tree.node, trace.prompt_tokens)
    at_root = f"{figure_name(trace)}, from {name}"
    yield ContributionLine(depth, name if depth else at_root, tree.contribution, tree)
    for part in tree.parts:
        yield from contribution_lines(part, trace, depth + 1)
    if tree.parts:
        yield ContributionLine(depth + 1, "rest", tree.rest, None)
