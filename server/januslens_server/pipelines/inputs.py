"""Resolve the texts, token ids, layers, positions, matrices and losses of a request."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase
from itertools import accumulate

from januslens_server.errors import CancelCheck, InvalidRequest, never_cancelled, shortlist
from januslens_server.graph.block_flow import STREAM_KINDS, SUBLAYER_KINDS
from januslens_server.lens.backward_lens import (
    Loss,
    Segment,
    logit_difference,
    negative_log_likelihood,
    segment_positions,
    suppression_divergence,
)
from januslens_server.models.resident import ResidentModel
from januslens_server.models.sites import (
    AFTER_LAYERS,
    BEFORE_LAYERS,
    SITES_WITH_HEADS,
    SiteKey,
    site_experts,
    site_keys,
    site_shape,
    sites_of_layer,
)
from januslens_server.models.tokenizer import TokenizerFailed, TooManyTokens
from januslens_server.results import LayerLevel, Level, MatrixKind, NodeKind, Token
from januslens_server.specs import (
    MAX_SUPPRESSED,
    Chat,
    GradientLensSpec,
    HeadSource,
    KlDivergence,
    LogitDifference,
    Prompt,
    Selection,
    Site,
    Span,
    Target,
    Text,
    Unit,
)

# Maximum number of tokens that an error lists; more would not fit into a status.
LISTED = 20


def read_prompt(
    model: ResidentModel,
    prompt: Prompt,
    room: int = 0,
    field: str = "input",
    check_cancelled: CancelCheck = never_cancelled,
) -> list[Token]:
    """Return the prompt's tokens; a text gets special tokens, token ids are used as they are.

    A conversation is rendered by the tokenizer's chat template. `check_cancelled` is called before
    the prompt is tokenized, and while its template runs.

    Raises `InvalidRequest` if the prompt is empty, has ids outside the vocabulary, or does not
    leave `room` positions of the model's context free.
    """
    check_cancelled()
    limit = model.view.facts.max_positions - room
    if isinstance(prompt, str):
        prompt = Text(prompt)
    if isinstance(prompt, Text):
        field += ".prompt"
        tokens = _prompt_tokens(model, prompt, limit, field)
    elif isinstance(prompt, Chat):
        field += ".chat"
        tokens = _chat_tokens(model, prompt, limit, field, check_cancelled)
    else:
        field += ".token_ids.ids"
        if len(prompt) > limit:
            raise _too_long(model, field, limit, f"{len(prompt)}")
        check_ids(model, prompt, field)
        tokens = [model.vocabulary.token(token_id) for token_id in prompt]
    if not tokens:
        raise InvalidRequest(field, "no tokens given; send at least one")
    if len(tokens) > limit:
        raise _too_long(model, field, limit, f"{len(tokens)}")
    return tokens


def _prompt_tokens(model: ResidentModel, prompt: Text, limit: int, field: str) -> list[Token]:
    with _tokenizing(model, field, limit):
        tokens = model.vocabulary.encode_prompt(
            prompt.text,
            add_special_tokens=prompt.add_special_tokens,
            literal=prompt.literal,
            at_most=limit,
        )
    return _known(model, tokens, field)


def _chat_tokens(
    model: ResidentModel, chat: Chat, limit: int, field: str, check_cancelled: CancelCheck
) -> list[Token]:
    with _tokenizing(model, field, limit):
        tokens = model.vocabulary.encode_chat(
            chat, field=field, at_most=limit, check_cancelled=check_cancelled
        )
    return _known(model, tokens, field)


@contextmanager
def _tokenizing(model: ResidentModel, field: str, limit: int) -> Iterator[None]:
    """Raise `InvalidRequest` if the text of `field` has too many tokens, or cannot be tokenized."""
    try:
        yield
    except TooManyTokens as error:
        raise _too_long(model, field, limit, "more") from error
    except TokenizerFailed as error:
        raise InvalidRequest(field, f"the tokenizer failed: {error}; send another text") from error


def _too_long(model: ResidentModel, field: str, limit: int, got: str) -> InvalidRequest:
    context = model.view.facts.max_positions
    kept = f" less {context - limit} for the target" if limit < context else ""
    return InvalidRequest(
        field,
        f"too many tokens: expected at most {limit}, the context of {model.name}{kept}, got {got}; "
        "shorten the text",
    )


def read_target(model: ResidentModel, target: Target, field: str) -> tuple[int, ...]:
    """Return the target's token ids; a text gets no special tokens, and its spaces are kept.

    Raises `InvalidRequest` if the target is empty, longer than the model's context, or has ids
    outside the vocabulary.
    """
    if isinstance(target, str):
        target = Text(target)
    if isinstance(target, Text):
        limit = model.view.facts.max_positions
        with _tokenizing(model, field, limit):
            tokens = model.vocabulary.encode_continuation(
                target.text, literal=target.literal, at_most=limit
            )
        ids = tuple(token.id for token in _known(model, tokens, field))
    else:
        if len(target) > (limit := model.view.facts.max_positions):
            raise _too_long(model, f"{field}.token_ids.ids", limit, f"{len(target)}")
        check_ids(model, target, f"{field}.token_ids.ids")
        ids = target
    if not ids:
        raise InvalidRequest(field, "no tokens given; send at least one")
    return ids


def read_single_target(model: ResidentModel, target: Target, field: str) -> int:
    """Return the single token of a target.

    Raises `InvalidRequest` if there are several; the error lists them. If the same text with or
    without a leading space is a single token, the error suggests it.
    """
    ids = read_target(model, target, field)
    if len(ids) > 1:
        shown = ids[:LISTED]
        listed = ", ".join(f"{i} {model.vocabulary.token(i).text!r}" for i in shown)
        listed += ", ..." if len(shown) < len(ids) else ""
        raise InvalidRequest(
            field,
            f"{len(ids)} tokens given ({listed}); expected a single token"
            + _other_spelling(model, target),
        )
    return ids[0]


def _other_spelling(model: ResidentModel, target: Target) -> str:
    """Suggest a target with or without its leading space if that is a single token."""
    if isinstance(target, str):
        target = Text(target)
    if not isinstance(target, Text):
        return ""
    text = target.text[1:] if target.text.startswith(" ") else " " + target.text
    try:
        tokens = model.vocabulary.encode_continuation(text, literal=target.literal, at_most=1)
    except (TooManyTokens, TokenizerFailed):
        return ""
    known = len(tokens) == 1 and tokens[0].id < model.view.facts.vocab_size
    return f", such as {text!r}" if known else ""


def read_layers(
    model: ResidentModel, layers: Sequence[int], field: str = "layers"
) -> tuple[int, ...]:
    """Return the layers in ascending order without duplicates; empty means all layers.

    Negative layers count from the last one.

    Raises `InvalidRequest` for a layer that the model does not have.
    """
    n_layers = model.view.facts.n_layers
    for layer in layers:
        if not -n_layers <= layer < n_layers:
            raise InvalidRequest(
                field, f"{model.name} has no layer {layer}; expected {-n_layers} to {n_layers - 1}"
            )
    return tuple(sorted({layer % n_layers for layer in layers})) or tuple(range(n_layers))


def read_selection(model: ResidentModel, selection: Selection) -> Selection:
    """Return a selection whose named heads, neurons and sources have layers from 0.

    Raises `InvalidRequest` for a head or neuron that the model does not have.
    """
    facts = model.view.facts
    heads = [
        _unit(model, unit, f"selection.only_heads[{i}]", Part.ATTENTION, facts.n_heads)
        for i, unit in enumerate(selection.only_heads)
    ]
    neurons = [
        _unit(model, unit, f"selection.only_neurons[{i}]", Part.MLP, facts.d_mlp, facts.n_experts)
        for i, unit in enumerate(selection.only_neurons)
    ]
    sources = []
    for i, (layer, head, position) in enumerate(selection.only_sources):
        field, of_head = f"selection.only_sources[{i}]", Unit(layer, head)
        found = _unit(model, of_head, field, Part.ATTENTION, facts.n_heads, number="head")
        sources.append(HeadSource(found.layer, found.number, position))
    return replace(
        selection,
        only_heads=tuple(heads),
        only_neurons=tuple(neurons),
        only_sources=tuple(sources),
    )


def read_sources(selection: Selection, length: int) -> Selection:
    """Return a selection whose named sources have positions from 0, in a prompt of this length.

    Raises `InvalidRequest` for a position outside the prompt.
    """
    found = []
    for i, named in enumerate(selection.only_sources):
        field = f"selection.only_sources[{i}].position"
        (position,) = read_positions((named.position,), False, length, field)
        found.append(named._replace(position=position))
    return replace(selection, only_sources=tuple(found))


def _unit(
    model: ResidentModel,
    unit: Unit,
    field: str,
    part: Part,
    count: int,
    experts: int = 0,
    number: str = "number",
) -> Unit:
    """Return one of the `count` heads or neurons of a layer, or of each of its experts."""
    (layer,) = layers_with_parts(model, (unit.layer,), f"{field}.layer", part)
    if unit.number >= count:
        raise InvalidRequest(
            f"{field}.{number}",
            f"layer {layer} of {model.name} has no number {unit.number}; expected 0 to {count - 1}",
        )
    if unit.expert is None and experts:
        raise InvalidRequest(
            f"{field}.expert", f"no expert given; expected 0 to {experts - 1} for {model.name}"
        )
    if unit.expert is not None and unit.expert >= experts:
        expected = f"0 to {experts - 1}" if experts else "none"
        raise InvalidRequest(
            f"{field}.expert", f"unknown expert {unit.expert}; expected {expected}"
        )
    return unit._replace(layer=layer)


def read_positions(
    positions: Sequence[int], every: bool, length: int, field: str = "positions"
) -> tuple[int, ...]:
    """Return the query positions in ascending order without duplicates, counted from the start."""
    if every and positions:
        raise InvalidRequest(
            "all_positions", "positions and all_positions are both set; set only one of them"
        )
    if every:
        return tuple(range(length))
    for position in positions:
        if not -length <= position < length:
            raise InvalidRequest(
                field,
                f"position {position} is outside the prompt; expected {-length} to {length - 1}",
            )
    return tuple(sorted({position % length for position in positions})) or (length - 1,)


def read_sites_of(
    model: ResidentModel, sites: Sequence[Site], layers: Sequence[int]
) -> tuple[SiteKey, ...]:
    """Return the requested sites of the requested layers, in the order of the pass.

    Empty `layers` means every layer that has the site.

    Raises `InvalidRequest` if a requested layer does not have a site.
    """
    if not sites:
        raise InvalidRequest("sites", "no sites given; send at least one")
    asked = read_layers(model, layers)
    keys: set[SiteKey] = set()
    for i, site in enumerate(sites):
        found = site_keys(model, site, asked)
        lacking = set(asked if layers or not found else ()) - {layer for layer, _ in found}
        if lacking and site not in BEFORE_LAYERS + AFTER_LAYERS:
            raise missing_site(model, site, min(lacking), f"sites[{i}]")
        keys.update(found)
    return tuple(sorted(keys))


def missing_site(model: ResidentModel, site: Site, layer: int, field: str) -> InvalidRequest:
    """Return the error for a layer that does not have a site, with the sites that it has."""
    present = ", ".join(site.name for site in sites_of_layer(model, layer))
    return InvalidRequest(
        field, f"layer {layer} of {model.name} has no {site.name}; expected one of {present}"
    )


def read_heads(
    model: ResidentModel, heads: Sequence[int], keys: Iterable[SiteKey], length: int
) -> tuple[int, ...]:
    """Return the heads in ascending order without duplicates; empty means all.

    Raises `InvalidRequest` if a site with heads does not have one of them, or if no site has heads.
    """
    if not heads:
        return ()
    counts = {
        key[1]: site_shape(model, key, length)[0] for key in keys if key[1] in SITES_WITH_HEADS
    }
    if not counts:
        names = ", ".join(site.name for site in SITES_WITH_HEADS)
        raise InvalidRequest("heads", f"none of the sites has heads; expected one of {names}")
    for site, count in counts.items():
        for head in heads:
            if head >= count:
                raise InvalidRequest(
                    "heads", f"{site.name} has no head {head}; expected 0 to {count - 1}"
                )
    return tuple(sorted(set(heads)))


def read_experts(
    model: ResidentModel, experts: Sequence[int], keys: Iterable[SiteKey], field: str = "experts"
) -> tuple[int, ...]:
    """Return the experts whose neurons are requested, in the order of the request; empty = all.

    Raises `InvalidRequest` if a mixture of the `keys` does not have one of them, if none of them
    has experts, or if one is repeated.
    """
    if not experts:
        return ()
    counts = [found.count for key in keys if (found := site_experts(model, key))]
    if not counts:
        raise InvalidRequest(
            field, "no requested site has experts; expected NEURONS in a layer with experts"
        )
    for expert in experts:
        if expert >= min(counts):
            raise InvalidRequest(
                field, f"NEURONS has no routed expert {expert}; expected 0 to {min(counts) - 1}"
            )
    if len(set(experts)) < len(experts):
        raise InvalidRequest(field, "experts are repeated; send each once")
    return tuple(experts)


def _known(model: ResidentModel, tokens: list[Token], field: str) -> list[Token]:
    """Check that the model has all tokens, because some tokenizers have more than their models."""
    size = model.view.facts.vocab_size
    for token in tokens:
        if token.id >= size:
            raise InvalidRequest(
                field,
                f"token {token.text!r} has id {token.id}, which is outside the vocabulary of "
                f"{model.name}; expected 0 to {size - 1}; remove it from the text",
            )
    return tokens


def check_ids(model: ResidentModel, ids: Sequence[int], field: str) -> None:
    """Raise `InvalidRequest` for the first id outside the vocabulary."""
    size = model.view.facts.vocab_size
    for i, token_id in enumerate(ids):
        if not 0 <= token_id < size:
            raise InvalidRequest(
                f"{field}[{i}]",
                f"unknown token id {token_id}; expected 0 to {size - 1} for {model.name}",
            )


@dataclass(frozen=True)
class MatrixChoice:
    """The requested kinds that the model has (`kinds`), and those it lacks (`skipped`)."""

    kinds: tuple[MatrixKind, ...]
    skipped: tuple[MatrixKind, ...]


def choose_matrices(
    model: ResidentModel, asked: Sequence[MatrixKind], field: str = "matrices"
) -> MatrixChoice:
    """Choose the requested kinds that the model has. In a gated MLP, FF1 means GATE and UP.

    Raises `InvalidRequest` if the model has none of them, or for MODULE.
    """
    if MatrixKind.MODULE in asked:
        raise InvalidRequest(
            field, "MODULE cannot be requested as a kind; name the modules in `modules`"
        )
    present = {kind for block in model.view.blocks for kind in block.matrices}
    wanted: list[MatrixKind] = []
    for kind in asked or (MatrixKind.FF1, MatrixKind.FF2):
        gated = kind is MatrixKind.FF1 and kind not in present
        wanted += (MatrixKind.GATE, MatrixKind.UP) if gated else (kind,)
    unique = tuple(dict.fromkeys(wanted))
    kinds = tuple(kind for kind in unique if kind in present)
    if not present:
        raise InvalidRequest(
            field,
            f"no layer of {model.name} has known matrices: {model.view.level(0).reason}; "
            f"{_named_maps(model, range(len(model.view.blocks)))}",
        )
    if not kinds:
        names = ", ".join(kind.name for kind in sorted(present))
        raise InvalidRequest(
            field, f"{model.name} has none of these matrices; expected at least one of {names}"
        )
    return MatrixChoice(kinds, tuple(kind for kind in unique if kind not in present))


def gradient_matrices(
    model: ResidentModel, spec: GradientLensSpec, layers: Sequence[int]
) -> tuple[list[tuple[int, MatrixKind | str]], tuple[MatrixKind, ...]]:
    """Return the matrices of a GradientLens, from the last layer down, and the skipped kinds.

    Raises `InvalidRequest` if a kind or a module of the request is in none of the layers.
    """
    found: list[tuple[int, MatrixKind | str]] = []
    skipped: tuple[MatrixKind, ...] = ()
    if spec.matrices or not spec.modules:
        choice = choose_matrices(model, spec.matrices)
        found += layer_matrices(model, layers[::-1], choice.kinds)
        skipped = choice.skipped
    for i, pattern in enumerate(spec.modules):
        named = [
            (layer, name)
            for layer in layers
            for name in model.view.blocks[layer].maps
            if fnmatchcase(name, pattern)
        ]
        if not named:
            raise InvalidRequest(
                f"modules[{i}]",
                f"none of these layers has a linear map {pattern!r}; {_named_maps(model, layers)}",
            )
        found += named
    return sorted(dict.fromkeys(found), key=lambda key: -key[0]), skipped


def _named_maps(model: ResidentModel, layers: Iterable[int]) -> str:
    """Say which linear maps a request may name."""
    names = dict.fromkeys(name for layer in layers for name in model.view.blocks[layer].maps)
    if not names:
        return "use a request that reads the residual stream"
    return f"expected modules such as {shortlist(list(names))}"


def layer_matrices(
    model: ResidentModel,
    layers: Sequence[int],
    kinds: Sequence[MatrixKind],
    field: str = "layers",
) -> list[tuple[int, MatrixKind]]:
    """Return the matrices of these kinds in each layer; some layers may lack a kind.

    Raises `InvalidRequest` if no layer has one of them.
    """
    blocks = model.view.blocks
    found = [(layer, kind) for layer in layers for kind in kinds if kind in blocks[layer].matrices]
    if not found:
        names = ", ".join(kind.name for kind in kinds)
        raise InvalidRequest(field, f"none of these layers has {names}; {_limits(model, layers)}")
    return found


class Part(Enum):
    """A part that a block may lack, by its field in `Block`."""

    ATTENTION = "attention"
    MLP = "MLP"


def layers_with_parts(
    model: ResidentModel,
    layers: Sequence[int] = (),
    field: str = "layers",
    part: Part | None = None,
) -> tuple[int, ...]:
    """Return the layers, by default all, without those whose parts are unknown.

    With a `part`, layers without it are left out as well.

    Raises `InvalidRequest` if a layer was named and its parts are unknown or it lacks the part, or
    if none is left.
    """
    asked, known = read_layers(model, layers, field), model.view.known
    having = {
        layer
        for layer, block in known.items()
        if part is None or getattr(block, part.name.lower()) is not None
    }
    lacking = [layer for layer in asked if layer not in having]
    if lacking and (layers or len(lacking) == len(asked)):
        unknown = [layer for layer in lacking if layer not in known]
        if unknown or part is None:
            raise InvalidRequest(field, _limits(model, unknown))
        listed = ", ".join(map(str, sorted(having))) or "none"
        raise InvalidRequest(
            field,
            f"layer {lacking[0]} of {model.name} has no {part.value}; layers that have one: "
            f"{listed}",
        )
    return tuple(layer for layer in asked if layer in having)


def _limits(model: ResidentModel, layers: Sequence[int]) -> str:
    """Say which of the layers have unknown parts, and why."""
    limited = model.view.limited(layers)
    if not limited:
        return "expected layers that have at least one of them"
    layer, level, reason, *_ = limited[0]
    shown = "the residual stream is"
    if level is Level.SUBLAYERS:
        shown = "the residual stream and the outputs of sublayers are"
    return f"only {shown} shown of layer {layer} of {model.name}: {reason}"


def check_node_kinds(
    model: ResidentModel, kinds: Collection[NodeKind], layers: Sequence[int], named: bool
) -> None:
    """Check that layers show the requested kinds of nodes; `named` if the request names the layers.

    Raises `InvalidRequest` if a named layer does not show one of them, or no layer does.
    """
    lacking = [
        (found.layer, kind, shown)
        for found in model.view.limited(layers)
        for shown in [_shown_kinds(model, found)]
        for kind in sorted(frozenset(kinds) - shown)
    ]
    if lacking and (named or len({layer for layer, *_ in lacking}) == len(layers)):
        layer, kind, shown = lacking[0]
        names = ", ".join(kind.name for kind in sorted(shown))
        raise InvalidRequest(
            "node_kinds",
            f"{kind.name} is unknown: {_limits(model, [layer])}; expected {names}",
        )


def _shown_kinds(model: ResidentModel, found: LayerLevel) -> frozenset[NodeKind]:
    """Return the kinds of nodes that a layer below `Level.PARTS` shows."""
    if found.level is not Level.SUBLAYERS:
        return STREAM_KINDS
    heads = {NodeKind.MIXER_HEAD} if model.view.mixer_heads(found.layer) else set()
    return SUBLAYER_KINDS | heads


@dataclass(frozen=True)
class Objective:
    """The model's input and the loss of a GradientLens.

    The first `prompt_length` of `tokens` are the prompt; target tokens follow (teacher forcing).
    `targets` are the tokens whose ranks are reported.
    """

    tokens: list[Token]
    prompt_length: int
    targets: tuple[int, ...]
    loss: Loss


def read_objective(
    model: ResidentModel, spec: GradientLensSpec, check_cancelled: CancelCheck = never_cancelled
) -> Objective:
    """Resolve the prompt and the loss.

    Raises `InvalidRequest` for prompts and targets that are invalid for the model.
    """
    if isinstance(spec.loss, KlDivergence):
        suppressed = _read_suppressed(model, spec.loss)
        tokens = read_prompt(model, spec.prompt, check_cancelled=check_cancelled)
        return Objective(tokens, len(tokens), suppressed, suppression_divergence(suppressed))
    if isinstance(spec.loss, LogitDifference):
        preferred = read_single_target(model, spec.loss.preferred, "logit_difference.preferred")
        other = read_single_target(model, spec.loss.other, "logit_difference.other")
        tokens = read_prompt(model, spec.prompt, check_cancelled=check_cancelled)
        loss = logit_difference(preferred, other)
        return Objective(tokens, len(tokens), (preferred, other), loss)
    targets = read_target(model, spec.loss.target, "nll.target")
    room = len(targets) - 1
    prompt = read_prompt(model, spec.prompt, room, check_cancelled=check_cancelled)
    forced = [model.vocabulary.token(token_id) for token_id in targets[:-1]]
    return Objective(prompt + forced, len(prompt), targets, negative_log_likelihood(targets))


def _read_suppressed(model: ResidentModel, loss: KlDivergence) -> tuple[int, ...]:
    field = "kl.suppressed.ids"
    check_ids(model, loss.suppressed, field)
    count = len(loss.suppressed) + len(loss.tokens)
    if count > MAX_SUPPRESSED:
        raise InvalidRequest(
            field, f"too many tokens: expected at most {MAX_SUPPRESSED}, got {count}"
        )
    if not count:
        raise InvalidRequest(field, "no tokens given; send at least one")
    named = (
        read_single_target(model, token, f"kl.tokens[{i}]") for i, token in enumerate(loss.tokens)
    )
    suppressed = tuple(dict.fromkeys((*loss.suppressed, *named)))
    if len(suppressed) >= model.view.facts.vocab_size:
        raise InvalidRequest(
            field, "the whole vocabulary is suppressed; leave out at least one token"
        )
    return suppressed


def read_segments(
    subject: str | Span | None, prompt: Prompt, objective: Objective
) -> dict[Segment, list[int]]:
    """Return the positions of the prompt's segments; empty without a subject.

    Raises `InvalidRequest` if the subject is not in the prompt.
    """
    if subject is None:
        return {}
    tokens = objective.tokens[: objective.prompt_length]
    span = _find(subject, prompt, tokens) if isinstance(subject, str) else subject
    if not 0 <= span.start < span.end <= len(tokens):
        raise InvalidRequest(
            "subject.span",
            f"invalid span {span.start} to {span.end}; expected 0 <= start < end <= {len(tokens)}",
        )
    return segment_positions(span.start, span.end, len(tokens))


def _find(subject: str, prompt: Prompt, tokens: Sequence[Token]) -> Span:
    """Find the tokens that contain a part of the last occurrence of `subject` in the prompt.

    In a text prompt, the characters of the text are searched, because tokenizers may change them
    (letter case, composed characters, spaces). In a conversation or a prompt of token ids, the
    bytes of the tokens are searched. If the subject does not occur with its outer spaces, it is
    searched for without them. The result never includes them.
    """
    asked, name = subject, subject.strip()
    if isinstance(prompt, (tuple, Chat)):  # compare bytes, each as one character
        asked, name = (text.encode().decode("latin-1") for text in (asked, name))
        whole = b"".join(token.raw for token in tokens).decode("latin-1")
        ends = list(accumulate(len(token.raw) for token in tokens))
        spans = list(zip([0, *ends], ends, strict=False))
    else:
        whole = prompt.text if isinstance(prompt, Text) else prompt
        spans = [(token.start or 0, token.end or 0) for token in tokens]
    exact = whole.rfind(asked)
    start = whole.rfind(name) if exact < 0 else exact + asked.index(name)
    end = start + len(name)
    touched = [i for i, (first, last) in enumerate(spans) if first < end and last > start]
    if not name or start < 0 or not touched:
        raise InvalidRequest("subject.text", f"{subject!r} does not occur in the prompt")
    return Span(touched[0], touched[-1] + 1)
