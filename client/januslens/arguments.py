"""The arguments of requests, as Python values and as messages.

An argument that no server could accept raises ValueError or TypeError. What depends on the model,
e.g. a layer that it does not have, is left to the server.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from januslens.results.kinds import MATRIX_KINDS, MatrixKind
from januslens.v1 import common_pb2, edits_pb2, gradient_lens_pb2


@dataclass(frozen=True)
class Text:
    """A prompt or target as text, with control over special and control tokens.

    Pass it wherever a prompt or a target is taken, for example
    `client.trace(Text("<|user|>Hi", literal=True))`. A plain string is `Text(string)`.

    Attributes:
        text: The text.
        special_tokens: Add the tokens that the tokenizer puts before a prompt (a BOS token, for
            example), unless the text begins with them. Targets never get any.
        literal: Read the characters as characters, even where they spell a control token.
    """

    text: str
    special_tokens: bool = True
    literal: bool = False


Prompt = str | Text | Sequence[int]
TargetLike = str | Text | int | Sequence[int]
Layers = int | slice | Iterable[int]
Positions = int | Iterable[int] | Literal["all"]
SubjectLike = str | tuple[int, int] | range

_UINT32 = 2**32
_INT32 = 2**31
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def input_message(prompt: Prompt) -> common_pb2.Input:
    """A prompt: text gets the tokenizer's special tokens, ids are taken as they are.

    Raises:
        TypeError: It is neither text nor ids.
        ValueError: There are no ids, or one is negative.
    """
    if isinstance(prompt, str):  # an empty one may still get a special token from the tokenizer
        return common_pb2.Input(prompt=prompt)
    if isinstance(prompt, Text):
        return common_pb2.Input(
            prompt=prompt.text,
            add_special_tokens=None if prompt.special_tokens else False,
            literal=prompt.literal,
        )
    return common_pb2.Input(token_ids=token_ids(prompt, "the prompt"))


def target_message(target: TargetLike, name: str = "the target") -> common_pb2.Target:
    """A target: in a text a leading space counts; an int is one token id.

    Raises:
        TypeError: It is neither text nor ids.
        ValueError: It is empty, or an id is negative.
    """
    if isinstance(target, str):
        _require_some(target, name)
        return common_pb2.Target(text=target)
    if isinstance(target, Text):
        _require_some(target.text, name)
        return common_pb2.Target(text=target.text, literal=target.literal)
    return common_pb2.Target(token_ids=token_ids(_several(target, name), name))


def token_ids(ids: Iterable[int], name: str) -> common_pb2.TokenIds:
    """Token ids, at least one.

    Raises:
        TypeError: One is no integer.
        ValueError: There are none, or one is negative.
    """
    listed = [count(token_id, f"{name}'s token ids") for token_id in _several(ids, name)]
    _require_some(listed, name)
    return common_pb2.TokenIds(ids=listed)


def subject_message(subject: SubjectLike) -> gradient_lens_pb2.Subject:
    """A subject: text of the prompt, or token positions `(start, end)`, end excluded.

    Raises:
        ValueError: The text is empty, or the positions are no span.
    """
    if isinstance(subject, str):
        if not subject:
            raise ValueError("expected some text for the subject; got none")
        return gradient_lens_pb2.Subject(text=subject)
    start, end = (subject.start, subject.stop) if isinstance(subject, range) else subject
    if not 0 <= start < end:
        raise ValueError(f"expected a subject of positions 0 <= start < end; got {start}, {end}")
    return gradient_lens_pb2.Subject(span=gradient_lens_pb2.Span(start=start, end=end))


def layer_numbers(layers: Layers | None) -> list[int]:
    """Layers from 0; None = all. A slice needs an end: only the server knows how many there are.

    Raises:
        TypeError: One is no integer.
        ValueError: There are none, one is negative, or a slice has no end.
    """
    if layers is None:
        return []
    if isinstance(layers, slice):
        if layers.stop is None or min(layers.start or 0, layers.stop, layers.step or 1) < 0:
            raise ValueError(f"expected a slice of layers like slice(0, 4); got {layers}")
        layers = range(layers.start or 0, layers.stop, layers.step or 1)
    numbers = [count(layer, "layers") for layer in _several(layers, "layers")]
    _require_some(numbers, "layers")
    return sorted(set(numbers))


def position_numbers(positions: Positions | None) -> tuple[list[int], bool]:
    """Query positions (negative from the end) and whether all are meant; None = the last one.

    Raises:
        TypeError: One is no integer.
        ValueError: There are none, one is beyond 32 bits, or a text is not "all".
    """
    if positions is None:
        return [], False
    if isinstance(positions, str):
        if positions != "all":
            raise ValueError(f'expected positions as integers or "all"; got {positions!r}')
        return [], True
    listed = _several(positions, "positions")
    numbers = [_bounded(position, "positions", -_INT32, _INT32) for position in listed]
    _require_some(numbers, "positions")
    return list(dict.fromkeys(numbers)), False


def optional_count(value: int | None, name: str) -> int | None:
    """How many of something, or None to leave it to the server.

    Raises:
        TypeError: It is no integer.
        ValueError: It is negative.
    """
    return None if value is None else count(value, name)


def count(value: int, name: str) -> int:
    """How many of something, or which one.

    Raises:
        TypeError: It is no integer.
        ValueError: It is negative.
    """
    return _bounded(value, name, 0, _UINT32)


def finite_number(value: Any, name: str) -> float:
    """A number that float32, in which it travels, can hold.

    Raises:
        TypeError: It is not a number.
        ValueError: It is infinite, NaN or too large.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not abs(float(value)) <= _FLOAT32_MAX:
        raise ValueError(f"{name} must be a finite number in float32, got {value}")
    return float(value)


def step_size(value: Any, name: str) -> float:
    """The strength of an edit: a finite number other than 0.

    Raises:
        TypeError: It is not a number.
        ValueError: It is infinite, NaN, too large, or 0 in float32.
    """
    if np.float32(finite_number(value, name)) == 0:
        raise ValueError(f"{name} must not be 0 in float32, got {value}")
    return float(value)


def _bounded(value: Any, name: str, low: int, high: int) -> int:
    """`value` as an int; numpy's integers are welcome, True and 1.0 are not."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"expected integers for {name}; got {value!r}")
    if not low <= value < high:
        raise ValueError(f"expected {name} from {low} to {high - 1}; got {value}")
    return int(value)


def _several(values: Any, name: str) -> Iterable[Any]:
    """One value as several, several as they are."""
    if isinstance(values, (int, np.integer)):
        return [values]
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"expected integers for {name}; got {values!r}")
    return values


def _require_some(values: Sequence[object], name: str) -> None:
    if not values:
        raise ValueError(f"nothing given for {name}; expected at least one entry")


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """`-log p(target | prompt)` in nats; several target tokens are summed, teacher-forced.

    The paper's loss, and what `gradient_lens(prompt, target)` means.
    """

    target: TargetLike


@dataclass(frozen=True)
class LogitDifference:
    """`logit(other) - logit(preferred)` at the last position."""

    preferred: TargetLike
    other: TargetLike


@dataclass(frozen=True)
class KlDivergence:
    """`KL(p without the suppressed tokens, renormalised || p)`, the first argument held fixed."""

    suppressed: Sequence[int]


Loss = NegativeLogLikelihood | LogitDifference | KlDivergence


def set_loss(request: gradient_lens_pb2.GradientLensRequest, loss: Loss) -> None:
    """Put a loss into a request.

    Raises:
        TypeError: It is none of the three.
        ValueError: A target or the suppressed tokens are empty.
    """
    match loss:
        case NegativeLogLikelihood(target):
            request.nll.target.CopyFrom(target_message(target))
        case LogitDifference(preferred, other):
            request.logit_difference.preferred.CopyFrom(target_message(preferred, "preferred"))
            request.logit_difference.other.CopyFrom(target_message(other, "other"))
        case KlDivergence(suppressed):
            request.kl.suppressed.CopyFrom(token_ids(suppressed, "suppressed"))
        case _:
            raise TypeError(
                "expected a NegativeLogLikelihood, LogitDifference or KlDivergence; "
                f"got {type(loss).__name__}"
            )


def matrix_numbers(
    kinds: Iterable[MatrixKind | str] | None,
) -> list[gradient_lens_pb2.MatrixKind.ValueType]:
    """None = FF1 and FF2; an empty list would mean that too, and surely was not meant.

    Raises:
        ValueError: There are none, or there is no such kind.
    """
    if kinds is None:
        return []
    named = [kinds] if isinstance(kinds, str) else list(kinds)
    if not named:
        raise ValueError("expected at least one kind for matrices; got none")
    return [MATRIX_KINDS.number(MatrixKind.of(kind)) for kind in named]


# Characters that fit into a label, however many bytes they take.
LABEL = 1024


@dataclass(frozen=True)
class DescentStep:
    """`W -= learning_rate * dL/dW`, L being the target's negative log-likelihood.

    Attributes:
        learning_rate: Length of the step.
        matrices: Kinds to change; None = FF1 and FF2.
        layers: Blocks to change; None = all.
    """

    learning_rate: float
    matrices: Iterable[MatrixKind | str] | None = None
    layers: Layers | None = None


@dataclass(frozen=True)
class ForwardShift:
    """`FF2 += eta x^T e` in one layer, from the forward pass alone (Backward Lens, section 7).

    x is FF2's input at the last position, e the input embedding of the target's first token.

    Attributes:
        layer: The block to change.
        eta: The strength; the paper uses 0.24 for layer 35 of GPT2-xl.
    """

    layer: int
    eta: float


Edit = DescentStep | ForwardShift


@dataclass(frozen=True)
class Probe:
    """A prompt to look at before and after the edit: a paraphrase, a neighbouring fact.

    Attributes:
        prompt: The prompt.
        target: The token to watch; None = the edit's target.
        label: A name that comes back with its effect.
    """

    prompt: Prompt
    target: TargetLike | None = None
    label: str = ""


def set_edit(request: edits_pb2.PreviewEditRequest, edit: Edit) -> None:
    """Put an edit into a request.

    Raises:
        TypeError: It is neither of the two.
        ValueError: Its layers or matrices are impossible.
    """
    match edit:
        case DescentStep(learning_rate, matrices, layers):
            request.descent.learning_rate = step_size(learning_rate, "learning_rate")
            request.descent.matrices.extend(matrix_numbers(matrices))
            request.descent.layers.extend(layer_numbers(layers))
        case ForwardShift(layer, eta):
            request.shift.layer = count(layer, "layer")
            request.shift.eta = step_size(eta, "eta")
        case _:
            raise TypeError(f"expected a DescentStep or a ForwardShift; got {type(edit).__name__}")


def probe_message(probe: Probe | str) -> edits_pb2.Probe:
    """A probe; a prompt alone is its own label, as far as labels go."""
    if isinstance(probe, str):
        probe = Probe(probe, label=probe[:LABEL])
    return edits_pb2.Probe(
        label=probe.label,
        input=input_message(probe.prompt),
        target=None if probe.target is None else target_message(probe.target),
    )
