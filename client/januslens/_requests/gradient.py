"""Arguments of a gradient lens."""

from __future__ import annotations

from collections.abc import Iterable

from januslens._requests.inputs import (
    Layers,
    Prompt,
    TargetLike,
    count,
    input_message,
    layer_numbers,
)
from januslens._requests.losses import Loss, NegativeLogLikelihood, set_loss
from januslens._results.kinds import LENSES, MATRIX_KINDS, Lens, MatrixKind
from januslens.v1 import gradient_lens_pb2

SubjectLike = str | tuple[int, int] | range


def gradient_lens_request(  # noqa: PLR0913 - one request, every field by name
    prompt: Prompt,
    target: TargetLike | None,
    *,
    loss: Loss | None,
    matrices: Iterable[MatrixKind | str] | None,
    layers: Layers | None,
    top_k: int | None,
    bottom_k: int | None,
    lens: Lens | str,
    components: int | None,
    spectrum: int,
    neurons: int,
    learning_rate: float | None,
    subject: SubjectLike | None,
    factors: bool,
    verify: bool,
    allow_batching: bool,
    model: str,
    revision: str,
) -> gradient_lens_pb2.GradientLensRequest:
    """The request; `januslens.Client.gradient_lens` says what each argument means.

    Raises:
        TypeError: An argument has a type that no request can hold.
        ValueError: An argument has a value that no server could accept, or of target and loss
            not exactly one is given.
    """
    request = gradient_lens_pb2.GradientLensRequest(
        model=model,
        revision=revision,
        input=input_message(prompt),
        matrices=[MATRIX_KINDS.number(kind) for kind in _kinds(matrices)],
        layers=layer_numbers(layers),
        top_k=count(top_k, "top_k"),
        bottom_k=count(bottom_k, "bottom_k"),
        lens=LENSES.number(Lens.of(lens)),
        components=count(components, "components"),
        spectrum_rank=count(spectrum, "spectrum"),
        neurons=count(neurons, "neurons"),
        learning_rate=learning_rate,
        subject=None if subject is None else _subject(subject),
        include_factors=factors,
        verify=verify,
        allow_batching=allow_batching,
    )
    set_loss(request, _one_loss(target, loss))
    return request


def _one_loss(target: TargetLike | None, loss: Loss | None) -> Loss:
    if loss is None and target is not None:
        return NegativeLogLikelihood(target)
    if target is None and loss is not None:
        return loss
    given = "neither" if loss is None else "both"
    raise ValueError(f"expected either a target or a loss; got {given}")


def _kinds(kinds: Iterable[MatrixKind | str] | None) -> list[MatrixKind]:
    """None = FF1 and FF2; an empty list would mean that too, and surely was not meant."""
    if kinds is None:
        return []
    named = [MatrixKind.of(kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    if not named:
        raise ValueError("expected at least one kind for matrices; got none")
    return named


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
