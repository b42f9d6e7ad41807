"""The gradient of every weight matrix as factors."""

from __future__ import annotations

from collections.abc import Iterable

from januslens._requests.inputs import (
    Layers,
    Prompt,
    TargetLike,
    count,
    finite_number,
    input_message,
    layer_numbers,
    optional_count,
)
from januslens._requests.losses import Loss, NegativeLogLikelihood, set_loss
from januslens._requests.matrices import matrix_numbers
from januslens._results.gradient import Gradient
from januslens._results.kinds import LENSES, Lens, MatrixKind
from januslens._stream.gradient import GradientAssembler, GradientEvent
from januslens._stream.gradient_splice import GradientSplice
from januslens._verbs.calls import StreamCall
from januslens.v1 import gradient_lens_pb2

SubjectLike = str | tuple[int, int] | range


def gradient_lens(  # noqa: PLR0913 - by keyword
    prompt: Prompt,
    target: TargetLike | None = None,
    *,
    loss: Loss | None = None,
    matrices: Iterable[MatrixKind | str] | None = None,
    layers: Layers | None = None,
    top_k: int | None = None,
    bottom_k: int | None = None,
    lens: Lens | str = Lens.FINAL_NORM,
    components: int | None = None,
    spectrum: int = 0,
    neurons: int = 0,
    learning_rate: float | None = None,
    subject: SubjectLike | None = None,
    factors: bool = False,
    verify: bool = False,
    model: str = "",
    revision: str = "",
    timeout: float | None = None,
) -> StreamCall[gradient_lens_pb2.GradientLensResponse, GradientEvent, Gradient]:
    """The gradient of every weight matrix as factors, read in the vocabulary (Backward Lens).

    Args:
        prompt: Text, which gets the tokenizer's special tokens, or token ids as they are.
        target: What the loss `-log p(target | prompt)` is of: literal text (a leading space
            counts), one id or several. Give this or `loss`.
        loss: Another loss: `LogitDifference`, `KlDivergence` or `NegativeLogLikelihood`.
        matrices: Kinds, e.g. `["FF1", "FF2"]`, which is also what None means; FF1 stands for
            GATE and UP where the MLP is gated.
        layers: Which blocks, from 0; None = all.
        top_k: How many of the most likely tokens a projection; None = the default, 0 = none.
        bottom_k: How many of the least likely tokens, likewise.
        lens: `FINAL_NORM`, `NORMALIZED` (the paper's answer to tiny VJPs) or `RAW`.
        components: How many factor pairs of each matrix, largest first; None = the server's
            default, 0 = all, which a dense gradient needs.
        spectrum: How many singular values and directions.
        neurons: How many of the neurons that a step moves most.
        learning_rate: The step's; None = only the direction of the neurons' change.
        subject: The prompt's subject, as text or token positions `(start, end)`: adds norms and
            ranks by segment.
        factors: Send the factors themselves, for `matrix.gradient()` and `gradient.save()`.
        verify: Compare each matrix with autograd's dense gradient.
        model: Its name; empty = the only one resident.
        revision: Refuse any other than this one; empty = whatever is resident.
        timeout: Seconds for the whole stream.

    Raises:
        TypeError: An argument has a type that no request can hold.
        ValueError: An argument has a value that no server could accept.
        GradientInterrupted: The stream was cut; its `partial` is the gradient so far.
        JanuslensError: The call failed; see `januslens.errors` for the kinds.
    """
    request = gradient_lens_pb2.GradientLensRequest(
        model=model,
        revision=revision,
        input=input_message(prompt),
        matrices=matrix_numbers(matrices),
        layers=layer_numbers(layers),
        top_k=optional_count(top_k, "top_k"),
        bottom_k=optional_count(bottom_k, "bottom_k"),
        lens=LENSES.number(Lens.of(lens)),
        components=optional_count(components, "components"),
        spectrum_rank=count(spectrum, "spectrum"),
        neurons=count(neurons, "neurons"),
        learning_rate=None
        if learning_rate is None
        else finite_number(learning_rate, "learning_rate"),
        subject=None if subject is None else _subject(subject),
        include_factors=factors,
        verify=verify,
    )
    set_loss(request, _one_loss(target, loss))
    return StreamCall(
        "GradientLens", request, timeout, GradientAssembler(), GradientSplice(request)
    )


def _one_loss(target: TargetLike | None, loss: Loss | None) -> Loss:
    if loss is None and target is not None:
        return NegativeLogLikelihood(target)
    if target is None and loss is not None:
        return loss
    given = "neither" if loss is None else "both"
    raise ValueError(f"expected either a target or a loss; got {given}")


def _subject(subject: SubjectLike) -> gradient_lens_pb2.Subject:
    """Text of the prompt, or token positions `(start, end)`, end excluded."""
    if isinstance(subject, str):
        if not subject:
            raise ValueError("expected some text for the subject; got none")
        return gradient_lens_pb2.Subject(text=subject)
    start, end = (subject.start, subject.stop) if isinstance(subject, range) else subject
    if not 0 <= start < end:
        raise ValueError(f"expected a subject of positions 0 <= start < end; got {start}, {end}")
    return gradient_lens_pb2.Subject(span=gradient_lens_pb2.Span(start=start, end=end))
