"""Giving a client's method the name, documentation and signature of the verb it carries out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_args, get_type_hints

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def verb_types(verb: Callable[..., Any]) -> tuple[Any, ...]:
    """The type arguments of what a verb returns; the last one is the call's result."""
    return get_args(get_type_hints(verb)["return"])


def described(
    method: FunctionT,
    verb: Callable[..., Any],
    returns: object,
    prefix: str = "",
    summary: str = "",
) -> FunctionT:
    """`method`, documented like `verb`, taking its arguments and returning `returns`.

    A `summary` takes the place of the verb's own.
    """
    method.__name__ = prefix + verb.__name__
    method.__qualname__ = method.__name__
    own, _, rest = (verb.__doc__ or "").partition("\n")
    method.__doc__ = f"{summary or own}\n{rest}"
    signature = inspect.signature(verb)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = signature.replace(  # type: ignore[attr-defined]  # inspect reads it
        parameters=[itself, *signature.parameters.values()], return_annotation=returns
    )
    return method
