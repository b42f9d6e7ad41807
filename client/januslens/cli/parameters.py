"""Options of several commands, and lists as they are typed: `0-3,7`, `-1,3` or `all`, `ff1,ff2`."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any, Literal

import click

from januslens._requests.inputs import Text
from januslens._results.kinds import Lens, MatrixKind

COUNT = click.IntRange(min=0)
LENS = click.Choice([lens.lower() for lens in Lens if lens is not Lens.UNSPECIFIED])


class Number(click.types.FloatParamType):
    """A number of at least `minimum`: never NaN, and infinite only where that is allowed."""

    def __init__(self, minimum: float | None = None, *, infinite: bool = False) -> None:
        self._minimum = minimum
        self._infinite = infinite

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The value as a float."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number) or (math.isinf(number) and not self._infinite):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        if self._minimum is not None and number < self._minimum:
            self.fail(f"{value!r} is less than {self._minimum:g}.", param, ctx)
        return number


_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def prompt_argument(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the argument PROMPT and the options that say how to tokenize it."""

    @functools.wraps(command)
    def run(*args: Any, prompt: str, no_special_tokens: bool, literal: bool, **kwargs: Any) -> None:
        command(*args, prompt=Text(prompt, not no_special_tokens, literal), **kwargs)

    decorated: Callable[..., None] = run
    for option in (
        click.option("--literal", is_flag=True, help="Read control tokens in PROMPT as text."),
        click.option(
            "--no-special-tokens", is_flag=True, help="Add no special tokens, such as BOS."
        ),
        click.argument("prompt"),
    ):
        decorated = option(decorated)
    return decorated


def layer_list(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[int] | None:
    """`0-3,7` as [0, 1, 2, 3, 7]: numbers and ranges, both ends included."""
    if value is None:
        return None
    layers: list[int] = []
    for piece in value.split(","):
        match = _RANGE.fullmatch(piece.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise click.BadParameter(f"expected layers like 0-3,7; got {value!r}")
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return layers


def position_list(
    _ctx: click.Context, _param: click.Parameter, value: str | None
) -> list[int] | Literal["all"] | None:
    """`-1,3` as [-1, 3], or `all`."""
    if value is None or value == "all":
        return value  # type: ignore[return-value]  # mypy does not narrow by equality
    try:
        return [int(piece) for piece in value.split(",")]
    except ValueError:
        message = f"expected positions like -1,3 or all; got {value!r}"
        raise click.BadParameter(message) from None


def matrix_list(
    _ctx: click.Context, _param: click.Parameter, value: str | None
) -> list[MatrixKind] | None:
    """`ff1,ff2` as the two kinds."""
    if value is None:
        return None
    try:
        return [MatrixKind.of(piece.strip()) for piece in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
