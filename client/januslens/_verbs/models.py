"""What is served, and how a model reads a text."""

from __future__ import annotations

from januslens._results.models import Model, Models
from januslens._results.tokens import Token, Tokens
from januslens._verbs.calls import Exchange, UnaryCall
from januslens.v1 import models_pb2


def list_models(*, timeout: float | None = None) -> Exchange[Models]:
    """The configured models with their state, sizes and what their self-checks measured.

    Args:
        timeout: Seconds to wait.

    Raises:
        JanuslensError: The call failed; see `januslens.errors` for the kinds.
    """
    models = Models()
    page_token = ""
    while True:
        request = models_pb2.ListModelsRequest(page_token=page_token)
        page: models_pb2.ListModelsResponse = yield UnaryCall("ListModels", request, timeout)
        models += [Model.from_message(model) for model in page.models]
        page_token = page.next_page_token
        if not page_token:
            return models


def tokenize(
    text: str,
    *,
    special_tokens: bool = False,
    literal: bool = False,
    model: str = "",
    timeout: float | None = None,
) -> Exchange[Tokens]:
    """The tokens of a text as a model reads it, with the characters that each one covers.

    Args:
        text: What to tokenize.
        special_tokens: Read it as a prompt, with the tokenizer's special tokens, and not as a
            target, whose spaces are its own.
        literal: Read its characters as characters, even where they spell a control token.
        model: Its name; empty = the only one resident.
        timeout: Seconds to wait.

    Raises:
        JanuslensError: The call failed; see `januslens.errors` for the kinds.
    """
    request = models_pb2.TokenizeRequest(
        model=model, text=text, with_special_tokens=special_tokens, literal=literal
    )
    response: models_pb2.TokenizeResponse = yield UnaryCall("Tokenize", request, timeout)
    return Tokens(Token.from_message(token) for token in response.tokens)
