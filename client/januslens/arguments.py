"""The arguments of requests as Python values, and their conversion to messages.

An argument that no server could accept raises ValueError or TypeError. The server checks what
depends on the model, such as layer numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from januslens.results.kinds import MATRIX_KINDS, MatrixKind
from januslens.v1 import common_pb2, edits_pb2, gradient_lens_pb2, trace_pb2


@dataclass(frozen=True)
class Text:
    """A prompt or target as text, with control over special and control tokens.

    Pass it in place of a prompt or target string, for example
    `client.trace(Text("<|user|>Hi", literal=True))`. A plain string means `Text(string)`.

    Attributes:
        text: The text.
        special_tokens: Add the tokens that the tokenizer puts before a prompt, such as BOS, unless
            the text already begins with them. Targets never get special tokens.
        literal: Read characters that spell a control token as ordinary text.
    """

    text: str
    special_tokens: bool = True
    literal: bool = False


@dataclass(frozen=True)
class Chat:
    """A conversation, rendered by the chat template of the model's tokenizer.

    Pass it in place of a prompt, or as `messages`, for example
    `client.trace(messages=[{"role": "user", "content": "Hi"}])`. A plain list of messages means
    `Chat(messages)`.

    Attributes:
        messages: Messages with `role` and `content`, in order. Control tokens in contents are
            ordinary text.
        continue_final_message: The model continues the last message instead of beginning the next.
    """

    messages: Sequence[Mapping[str, str]]
    continue_final_message: bool = False


Messages = Chat | Sequence[Mapping[str, str]]
Prompt = str | Text | Chat | Sequence[int]
TargetLike = str | Text | int | Sequence[int]
Layers = int | slice | Iterable[int]
Positions = int | Iterable[int] | Literal["all"]
SubjectLike = str | tuple[int, int] | range

_UINT32 = 2**32
_INT32 = 2**31
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def input_message(prompt: Prompt | None, messages: Messages | None = None) -> common_pb2.Input:
    """Build the message for a prompt; texts get special tokens, token ids are used as they are.

    Raises:
        TypeError: The prompt is neither a text nor token ids nor a conversation.
        ValueError: There are no token ids or messages, a token id is negative, or `prompt` and
            `messages` are both given or both missing.
    """
    if messages is not None:
        if prompt is not None:
            raise ValueError("prompt and messages are both given; give only one of them")
        return common_pb2.Input(chat=chat_message(messages))
    if prompt is None:
        raise ValueError("no prompt and no messages given; give one of them")
    if isinstance(prompt, Chat):
        return common_pb2.Input(chat=chat_message(prompt))
    if isinstance(prompt, str):  # may be empty: the tokenizer may add BOS
        return common_pb2.Input(prompt=checked_text(prompt, "prompt"))
    if isinstance(prompt, Text):
        return common_pb2.Input(
            prompt=checked_text(prompt.text, "prompt"),
            add_special_tokens=None if prompt.special_tokens else False,
            literal=prompt.literal,
        )
    ids = several(prompt, "prompt", "text or token ids")
    if isinstance(prompt, (list, tuple)) and any(
        isinstance(item, (str, Mapping)) for item in prompt
    ):
        raise TypeError(
            f"invalid prompt {prompt!r}; expected text or token ids; give a conversation as "
            "messages=[...] or Chat([...]), and several prompts one after the other or as a survey"
        )
    return common_pb2.Input(token_ids=token_ids(ids, "prompt"))


_MESSAGE_KEYS = {"role", "content"}


def chat_message(messages: Messages) -> common_pb2.Chat:
    """Build the message for a conversation.

    Raises:
        TypeError: The messages are not a list of mappings from `role` and `content` to texts.
        ValueError: There are no messages, or one has other keys.
    """
    chat = messages if isinstance(messages, Chat) else Chat(messages)
    if isinstance(chat.messages, (str, bytes, Mapping)) or not isinstance(chat.messages, Iterable):
        raise TypeError(f"invalid messages {chat.messages!r}; expected a list of messages")
    built = common_pb2.Chat(continue_final_message=chat.continue_final_message)
    for i, message in enumerate(chat.messages):
        name = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise TypeError(f"invalid {name} {message!r}; expected a mapping with role and content")
        if set(message) != _MESSAGE_KEYS:
            raise ValueError(f"{name} has the keys {sorted(message)}; expected role and content")
        role, content = (checked_text(message[key], f"{name}.{key}") for key in ("role", "content"))
        built.messages.add(role=role, content=content)
    _require_some(built.messages, "messages", "message")
    return built


def target_message(target: TargetLike, name: str = "target") -> common_pb2.Target:
    """Build the message for a target: a text, whose leading space counts, or token ids.

    Raises:
        TypeError: The target is neither a text nor token ids.
        ValueError: The target is empty, or a token id is negative.
    """
    if isinstance(target, str):
        _require_some(target, name, "character")
        return common_pb2.Target(text=checked_text(target, name))
    if isinstance(target, Text):
        _require_some(target.text, name, "character")
        text = checked_text(target.text, name)
        return common_pb2.Target(text=text, literal=target.literal)
    ids = several(target, name, "text or token ids")
    return common_pb2.Target(token_ids=token_ids(ids, name))


def token_ids(ids: Iterable[int], name: str) -> common_pb2.TokenIds:
    """Build the message for one or more token ids.

    Raises:
        TypeError: A token id is not an integer.
        ValueError: There are no token ids, or one is negative.
    """
    listed = [
        count(token_id, f"token ids of {name}") for token_id in several(ids, name, "token ids")
    ]
    _require_some(listed, name, "token id")
    return common_pb2.TokenIds(ids=listed)


def subject_message(subject: SubjectLike) -> gradient_lens_pb2.Subject:
    """Build the message for a subject: a text, or positions `(start, end)`, end excluded.

    Raises:
        ValueError: The text is empty, or the positions are not 0 <= start < end.
    """
    if isinstance(subject, str):
        if not subject:
            raise ValueError("subject is empty; give a part of the prompt")
        return gradient_lens_pb2.Subject(text=checked_text(subject, "subject"))
    start, end = (subject.start, subject.stop) if isinstance(subject, range) else subject
    if not 0 <= start < end:
        raise ValueError(f"invalid subject {start}, {end}; expected positions 0 <= start < end")
    return gradient_lens_pb2.Subject(span=gradient_lens_pb2.Span(start=start, end=end))


def checked_text(text: Any, name: str) -> str:
    """Return the text if protobuf can hold it.

    Raises:
        TypeError: `text` is not a string.
        ValueError: `text` contains a lone surrogate, which Python makes of invalid UTF-8.
    """
    if not isinstance(text, str):
        raise TypeError(f"invalid {name} of type {type(text).__name__}; expected str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = f"character {error.start} is the lone surrogate {text[error.start]!r}"
        raise ValueError(f"invalid {name}: {wrong}; expected valid Unicode") from None
    return text


def layer_numbers(layers: Layers | None) -> list[int]:
    """Return layer numbers, sorted; an empty list (from None) means all layers.

    Negative layers count from the last one. A slice must not cross from one way of counting to the
    other, because only the server knows the number of layers.

    Raises:
        TypeError: A layer is not an integer.
        ValueError: There are no layers, one exceeds 32 bits, or a slice is invalid.
    """
    if layers is None:
        return []
    if isinstance(layers, slice):
        layers = _layer_range(layers)
    listed = several(layers, "layers")
    numbers = [_bounded(layer, "layers", -_INT32, _INT32) for layer in listed]
    _require_some(numbers, "layers")
    return sorted(set(numbers))


def _layer_range(layers: slice) -> range:
    """Return the layers of a slice such as `slice(0, 4)` or `slice(-4, None)`."""
    start, step = layers.start or 0, layers.step or 1
    end = 0 if layers.stop is None and start < 0 else layers.stop
    if end is None or step < 1 or (start < 0) != (end < 0 or layers.stop is None):
        raise ValueError(
            f"invalid layers {layers}; expected a slice such as slice(0, 4) or slice(-4, None)"
        )
    return range(start, end, step)


def index_numbers(indices: int | Iterable[int] | None, name: str) -> list[int]:
    """Return indices such as heads, sorted; an empty list (from None) means all of them.

    Raises:
        TypeError: An index is not an integer.
        ValueError: There are no indices, or one is negative.
    """
    if indices is None:
        return []
    numbers = [count(index, name) for index in several(indices, name)]
    _require_some(numbers, name)
    return sorted(set(numbers))


def position_numbers(positions: Positions | None) -> tuple[list[int], bool]:
    """Return the query positions, and whether all positions are requested.

    Negative positions count from the end. None, for the last position, gives an empty list.

    Raises:
        TypeError: A position is not an integer.
        ValueError: There are no positions, one exceeds 32 bits, or a text is not "all".
    """
    if positions is None:
        return [], False
    if isinstance(positions, str):
        if positions != "all":
            raise ValueError(f'invalid positions {positions!r}; expected integers or "all"')
        return [], True
    listed = several(positions, "positions")
    numbers = [_bounded(position, "positions", -_INT32, _INT32) for position in listed]
    _require_some(numbers, "positions")
    return list(dict.fromkeys(numbers)), False


def optional_count(value: int | None, name: str) -> int | None:
    """Check a count that may be None, which means the server's default.

    Raises:
        TypeError: The value is not an integer.
        ValueError: The value is negative or exceeds 32 bits.
    """
    return None if value is None else count(value, name)


def count(value: int, name: str, end: int = _UINT32) -> int:
    """Check a count or an index, which must be below `end`.

    Raises:
        TypeError: The value is not an integer.
        ValueError: The value is negative or too large.
    """
    return _bounded(value, name, 0, end)


def finite_number(value: Any, name: str) -> float:
    """Check a number that is sent as float32.

    Raises:
        TypeError: The value is not a number.
        ValueError: The value is infinite, NaN or too large for float32.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"invalid {name} {value!r}; expected a number")
    if not abs(float(value)) <= _FLOAT32_MAX:
        raise ValueError(f"invalid {name} {value}; expected a finite number in float32")
    return float(value)


def bounded_number(value: Any, name: str, largest: float = _FLOAT32_MAX) -> float:
    """Check a number from 0 to `largest`, which is sent as float32.

    Raises:
        TypeError: The value is not a number.
        ValueError: The value is NaN, negative or too large.
    """
    number = finite_number(value, name)
    if not 0 <= number <= largest:
        upper = "" if largest == _FLOAT32_MAX else f" and at most {largest:g}"
        raise ValueError(f"invalid {name} {value}; expected a number of at least 0{upper}")
    return number


def step_size(value: Any, name: str) -> float:
    """Check the strength of an edit: a finite number other than 0.

    Raises:
        TypeError: The value is not a number.
        ValueError: The value is infinite, NaN, too large, or 0 in float32.
    """
    if np.float32(finite_number(value, name)) == 0:
        raise ValueError(f"invalid {name} {value}; expected a number other than 0 in float32")
    return float(value)


def _bounded(value: Any, name: str, low: int, high: int) -> int:
    """Return `value` as an int; accept numpy's integers, but not bools and floats."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"invalid {name}: {value!r} is not an integer")
    if not low <= value < high:
        raise ValueError(f"invalid {name}: {value} is not between {low} and {high - 1}")
    return int(value)


def several(values: Any, name: str, wanted: str = "integers") -> Iterable[Any]:
    """Return the values; a single integer becomes a list of one."""
    if isinstance(values, (int, np.integer)):
        return [values]
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"invalid {name} {values!r}; expected {wanted}")
    return values


def _require_some(values: Sequence[object], name: str, unit: str = "entry") -> None:
    if not values:
        raise ValueError(f"{name} is empty; give at least one {unit}")


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """`-log p(target | prompt)` in nats; for several target tokens the sum, with teacher forcing.

    This is the loss of the Backward Lens paper, and that of `gradient_lens(prompt, target)`.
    """

    target: TargetLike


@dataclass(frozen=True)
class LogitDifference:
    """`logit(other) - logit(preferred)` at the last position."""

    preferred: TargetLike
    other: TargetLike


@dataclass(frozen=True)
class KlDivergence:
    """`KL(q || p)`, where q is p without the suppressed tokens, renormalised and held fixed.

    Attributes:
        suppressed: Ids or texts of the tokens to suppress; each text is one token.
    """

    suppressed: str | Text | Sequence[int | str | Text]


Loss = NegativeLogLikelihood | LogitDifference | KlDivergence


def set_loss(request: gradient_lens_pb2.GradientLensRequest, loss: Loss) -> None:
    """Set the loss of a request.

    Raises:
        TypeError: The loss has none of the three types.
        ValueError: A target or the suppressed tokens are empty.
    """
    match loss:
        case NegativeLogLikelihood(target):
            request.nll.target.CopyFrom(target_message(target))
        case LogitDifference(preferred, other):
            request.logit_difference.preferred.CopyFrom(target_message(preferred, "preferred"))
            request.logit_difference.other.CopyFrom(target_message(other, "other"))
        case KlDivergence(suppressed):
            tokens = [suppressed] if isinstance(suppressed, (str, Text)) else list(suppressed)
            _require_some(tokens, "suppressed", "token")
            texts = [token for token in tokens if isinstance(token, (str, Text))]
            request.kl.tokens.extend(target_message(text, "suppressed") for text in texts)
            if ids := [token for token in tokens if not isinstance(token, (str, Text))]:
                request.kl.suppressed.CopyFrom(token_ids(ids, "suppressed"))
        case _:
            raise TypeError(
                f"invalid loss of type {type(loss).__name__}; "
                "expected a NegativeLogLikelihood, LogitDifference or KlDivergence"
            )


def matrix_numbers(
    kinds: Iterable[MatrixKind | str] | None,
) -> list[gradient_lens_pb2.MatrixKind.ValueType]:
    """Return the numbers of matrix kinds; an empty list (from None) means FF1 and FF2.

    An empty list of the caller is refused, because it probably does not mean FF1 and FF2.

    Raises:
        ValueError: The list is empty, or there is no such kind.
    """
    if kinds is None:
        return []
    named = [kinds] if isinstance(kinds, str) else list(kinds)
    if not named:
        raise ValueError("matrices is empty; give at least one kind, or None for FF1 and FF2")
    return [MATRIX_KINDS.number(MatrixKind.of(kind)) for kind in named]


def module_names(names: Iterable[str]) -> list[str]:
    """Return names of modules; a single one may be given as a text.

    Raises:
        TypeError: A name is not a text.
        ValueError: A name cannot be sent.
    """
    named = [names] if isinstance(names, str) else list(names)
    return [checked_text(name, "modules") for name in named]


# Maximum number of characters of a label.
LABEL = 1024


@dataclass(frozen=True)
class DescentStep:
    """A descent step `W -= learning_rate * dL/dW`; L is the target's negative log likelihood.

    Attributes:
        learning_rate: The factor of the gradient.
        matrices: Kinds of matrices to change; None = FF1 and FF2.
        layers: Layers to change; None = all.
    """

    learning_rate: float
    matrices: Iterable[MatrixKind | str] | None = None
    layers: Layers | None = None


@dataclass(frozen=True)
class ForwardShift:
    """A forward shift `FF2 += eta x^T e` in one layer (Backward Lens, section 7).

    x is the input of FF2 at the last position, and e the input embedding of the target's first
    token. No backward pass is needed.

    Attributes:
        layer: The layer to change.
        eta: The strength of the edit; the paper uses 0.24 for layer 35 of GPT2-xl.
        gradient_cosine: Also compare the edit with a descent step, which takes a backward pass.
    """

    layer: int
    eta: float
    gradient_cosine: bool = False


Edit = DescentStep | ForwardShift


@dataclass(frozen=True)
class Probe:
    """A prompt to report before and after an edit, such as a paraphrase or a neighbouring fact.

    Attributes:
        prompt: The prompt.
        target: The token whose rank and probability are reported; None = the edit's target.
        label: A name, repeated in the result.
    """

    prompt: Prompt
    target: TargetLike | None = None
    label: str = ""


# The ids of nodes of a single head, neuron or source, with an example (docs/semantics.md, "Ids").
_UNIT_IDS = {
    "only_heads": (re.compile(r"L(\d+)/p\d+/[A-Z_]+/h(\d+)"), "L3/p7/HEAD_OUTPUT/h2"),
    "only_neurons": (
        re.compile(r"L(\d+)/p\d+/MLP_(?:KEY|UP|VALUE)/(?:e(\d+)/)?n(\d+)"),
        "L3/p7/MLP_VALUE/n911",
    ),
    "only_sources": (
        re.compile(r"L(\d+)/p\d+/MEMORY_(?:KEY|VALUE)/h(\d+)/s(\d+)"),
        "L3/p7/MEMORY_VALUE/h2/s4",
    ),
}


def unit_messages(units: Iterable[Sequence[int] | str], name: str) -> list[trace_pb2.Unit]:
    """Build the messages for heads or neurons: layer and number, or layer, expert and number.

    `name` is the argument, `only_heads` or `only_neurons`. Ids of nodes are accepted as well.

    Raises:
        TypeError: A number is not an integer.
        ValueError: There are not two or three numbers, a number is out of range, or an id is not
            that of a head or neuron.
    """
    messages = []
    for entry in units:
        unit = _unit_of_id(entry, name) if isinstance(entry, str) else entry
        if len(unit) not in (2, 3):
            raise ValueError(
                f"invalid entry {unit!r} of {name}; expected (layer, number) or "
                "(layer, expert, number)"
            )
        layer, *experts, number = unit
        messages.append(
            trace_pb2.Unit(
                layer=_bounded(layer, name, -_INT32, _INT32),
                number=_bounded(number, name, 0, _INT32),
                expert=_bounded(experts[0], name, 0, _INT32) if experts else None,
            )
        )
    return messages


def source_messages(sources: Iterable[Sequence[int] | str]) -> list[trace_pb2.HeadSource]:
    """Build the messages for sources of heads: layer, head and source position, or ids of nodes.

    Raises:
        TypeError: A number is not an integer.
        ValueError: There are not three numbers, a number is out of range, or an id is not that of
            a source.
    """
    messages = []
    for entry in sources:
        found = _unit_of_id(entry, "only_sources") if isinstance(entry, str) else entry
        if len(found) != 3:
            raise ValueError(
                f"invalid entry {found!r} of only_sources; expected (layer, head, position)"
            )
        layer, head, position = found
        messages.append(
            trace_pb2.HeadSource(
                layer=_bounded(layer, "only_sources", -_INT32, _INT32),
                head=_bounded(head, "only_sources", 0, _INT32),
                position=_bounded(position, "only_sources", -_INT32, _INT32),
            )
        )
    return messages


def _unit_of_id(node_id: str, name: str) -> list[int]:
    pattern, example = _UNIT_IDS[name]
    found = pattern.fullmatch(node_id)
    if found is None:
        raise ValueError(f"invalid entry {node_id!r} of {name}; expected an id such as {example!r}")
    return [int(number) for number in found.groups() if number is not None]


def set_edit(request: edits_pb2.PreviewEditRequest, edit: Edit) -> None:
    """Set the edit of a request.

    Raises:
        TypeError: The edit has neither of the two types, or a field has a wrong type.
        ValueError: A field has a value that no server accepts.
    """
    match edit:
        case DescentStep(learning_rate, matrices, layers):
            request.descent.learning_rate = step_size(learning_rate, "learning_rate")
            request.descent.matrices.extend(matrix_numbers(matrices))
            request.descent.layers.extend(layer_numbers(layers))
        case ForwardShift(layer, eta, gradient_cosine):
            request.shift.layer = _bounded(layer, "layer", -_INT32, _INT32)
            request.shift.eta = step_size(eta, "eta")
            request.shift.include_gradient_cosine = gradient_cosine
        case _:
            raise TypeError(
                f"invalid edit of type {type(edit).__name__}; "
                "expected a DescentStep or a ForwardShift"
            )


def set_edit_grid(
    request: edits_pb2.PreviewEditRequest,
    learning_rates: Iterable[float],
    etas: Iterable[float],
    layers: Layers | None,
    matrices: Iterable[MatrixKind | str] | None,
    gradient_cosine: bool,
) -> None:
    """Set the edits of a request, one for each layer and each learning rate or eta.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: An argument has a value that no server accepts, or both or none of
            `learning_rates` and `etas` are given.
    """
    rates = [step_size(rate, "learning_rates") for rate in learning_rates]
    strengths = [step_size(eta, "etas") for eta in etas]
    if bool(rates) == bool(strengths):
        given = "both" if rates else "none"
        raise ValueError(f"{given} of learning_rates and etas are given; give one of them")
    if strengths and matrices is not None:
        raise ValueError("etas are given with matrices; a forward shift always changes FF2")
    if rates and gradient_cosine:
        raise ValueError(
            "learning_rates are given with gradient_cosine; a descent step follows the gradient, "
            "so that its cosine is 1; give etas"
        )
    if rates:
        request.descent.SetInParent()
        request.descent.matrices.extend(matrix_numbers(matrices))
    else:
        request.shift.SetInParent()
        request.shift.include_gradient_cosine = gradient_cosine
    request.grid.layers.extend(layer_numbers(layers))
    request.grid.strengths.extend(rates or strengths)


def probe_message(probe: Probe | str) -> edits_pb2.Probe:
    """Build the message for a probe; the label of a plain prompt is its own beginning."""
    if isinstance(probe, str):
        probe = Probe(probe, label=probe[:LABEL])
    return edits_pb2.Probe(
        input=input_message(probe.prompt),
        label=checked_text(probe.label, "label"),
        target=None if probe.target is None else target_message(probe.target),
    )
