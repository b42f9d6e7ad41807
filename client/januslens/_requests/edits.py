"""The edits that can be previewed, and the prompts to watch meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from januslens._requests.inputs import (
    Layers,
    Prompt,
    TargetLike,
    count,
    input_message,
    layer_numbers,
    step_size,
    target_message,
)
from januslens._requests.matrices import matrix_numbers
from januslens._results.kinds import MatrixKind
from januslens.v1 import edits_pb2

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
