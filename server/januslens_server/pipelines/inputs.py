"""Turning what a request names (texts, ids, layers, positions) into this model's own numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from januslens_server.errors import InvalidRequest
from januslens_server.models.resident import ResidentModel
from januslens_server.models.tokens import TooManyTokens
from januslens_server.results import Token
from januslens_server.specs import Prompt, Target, Text

# Tokens that an error lists; more would not fit into a status.
LISTED = 20


def read_prompt(
    model: ResidentModel, prompt: Prompt, room: int = 0, field: str = "input"
) -> list[Token]:
    """The prompt's tokens: a text gets the tokenizer's special tokens, ids are taken as they are.

    Raises `InvalidRequest` if it is empty, names ids outside the vocabulary, or does not leave
    `room` positions of the model's context free.
    """
    limit = model.view.facts.max_positions - room
    if isinstance(prompt, str):
        prompt = Text(prompt)
    if isinstance(prompt, Text):
        field += ".prompt"
        tokens = _prompt_tokens(model, prompt, limit, field)
    else:
        field += ".token_ids.ids"
        check_ids(model, prompt, field)
        tokens = [model.vocabulary.token(token_id) for token_id in prompt]
    if not tokens:
        raise InvalidRequest(field, "expected at least one token, got none")
    if len(tokens) > limit:
        raise _too_long(field, limit, f"{len(tokens)}")
    return tokens


def _prompt_tokens(model: ResidentModel, prompt: Text, limit: int, field: str) -> list[Token]:
    try:
        tokens = model.vocabulary.encode_prompt(
            prompt.text,
            add_special_tokens=prompt.add_special_tokens,
            literal=prompt.literal,
            at_most=limit,
        )
    except TooManyTokens as error:
        raise _too_long(field, limit, "more") from error
    return _known(model, tokens, field)


def _too_long(field: str, limit: int, got: str) -> InvalidRequest:
    return InvalidRequest(field, f"expected at most {limit} tokens, got {got}; shorten the text")


def read_target(model: ResidentModel, target: Target, field: str) -> tuple[int, ...]:
    """The target's token ids: a text gets no special tokens, and its spaces are its own.

    Raises `InvalidRequest` if it is empty, longer than the model's context or names ids outside
    the vocabulary.
    """
    if isinstance(target, str):
        target = Text(target)
    if isinstance(target, Text):
        limit = model.view.facts.max_positions
        try:
            tokens = model.vocabulary.encode_continuation(
                target.text, literal=target.literal, at_most=limit
            )
        except TooManyTokens as error:
            raise _too_long(field, limit, "more") from error
        ids = tuple(token.id for token in _known(model, tokens, field))
    else:
        check_ids(model, target, f"{field}.token_ids.ids")
        ids = target
    if not ids:
        raise InvalidRequest(field, "expected at least one token, got none")
    return ids


def read_single_target(model: ResidentModel, target: Target, field: str) -> int:
    """The one token of a target; raises `InvalidRequest` listing them if there are several."""
    ids = read_target(model, target, field)
    if len(ids) > 1:
        shown = ids[:LISTED]
        listed = ", ".join(f"{i} {model.vocabulary.token(i).text!r}" for i in shown)
        listed += ", ..." if len(shown) < len(ids) else ""
        raise InvalidRequest(field, f"expected one token, got {len(ids)}: {listed}")
    return ids[0]


def read_layers(
    model: ResidentModel, layers: Sequence[int], field: str = "layers"
) -> tuple[int, ...]:
    """Layers in ascending order, each once; empty means all."""
    n_layers = model.view.facts.n_layers
    return _within(layers, n_layers, field, model.name) or tuple(range(n_layers))


def read_positions(positions: Sequence[int], every: bool, length: int) -> tuple[int, ...]:
    """Query positions in ascending order, each once; negative ones count from the end."""
    if every and positions:
        raise InvalidRequest(
            "all_positions", "expected either positions or all_positions, got both"
        )
    if every:
        return tuple(range(length))
    for position in positions:
        if not -length <= position < length:
            raise InvalidRequest(
                "positions", f"expected {-length} to {length - 1} for this prompt, got {position}"
            )
    return tuple(sorted({position % length for position in positions})) or (length - 1,)


def _within(values: Iterable[int], size: int, field: str, name: str) -> tuple[int, ...]:
    chosen = sorted(set(values))
    for value in chosen:
        if not 0 <= value < size:
            raise InvalidRequest(field, f"expected 0 to {size - 1} for {name}, got {value}")
    return tuple(chosen)


def _known(model: ResidentModel, tokens: list[Token], field: str) -> list[Token]:
    """The tokens, all of which the model has; a tokenizer may have more than its model."""
    size = model.view.facts.vocab_size
    for token in tokens:
        if token.id >= size:
            raise InvalidRequest(
                field,
                f"expected a text of the {size} tokens of {model.name}, got {token.text!r}, which "
                f"only its tokenizer has ({token.id}); leave it out",
            )
    return tokens


def check_ids(model: ResidentModel, ids: Sequence[int], field: str) -> None:
    """Raise `InvalidRequest` naming the first id outside the vocabulary."""
    size = model.view.facts.vocab_size
    for i, token_id in enumerate(ids):
        if not 0 <= token_id < size:
            raise InvalidRequest(
                f"{field}[{i}]",
                f"expected a token id below {size} for {model.name}, got {token_id}",
            )
