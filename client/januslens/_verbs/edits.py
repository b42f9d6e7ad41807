"""What an edit would do, without making it."""

from __future__ import annotations

from collections.abc import Iterable

from januslens._requests.edits import Edit, Probe, probe_message, set_edit
from januslens._requests.inputs import Prompt, TargetLike, input_message, target_message
from januslens._results.edits import EditPreview
from januslens._verbs.calls import Exchange, UnaryCall
from januslens.v1 import edits_pb2


def preview_edit(
    prompt: Prompt,
    target: TargetLike,
    edit: Edit,
    *,
    probes: Iterable[Probe | str] = (),
    model: str = "",
    revision: str = "",
    timeout: float | None = None,
) -> Exchange[EditPreview]:
    """What an edit would do to the prompt and to others; the model stays as it is.

    Args:
        prompt: The prompt that the edit is made for, as text or token ids.
        target: What the edited model should say: literal text (a leading space counts), one id
            or several, of which the first is reported.
        edit: A `DescentStep` or a `ForwardShift`.
        probes: Other prompts to look at before and after.
        model: Its name; empty = the only one resident.
        revision: Refuse any other than this one; empty = whatever is resident.
        timeout: Seconds to wait.

    Raises:
        TypeError: An argument has a type that no request can hold.
        ValueError: An argument has a value that no server could accept.
        JanuslensError: The call failed; see `januslens.errors` for the kinds.
    """
    request = edits_pb2.PreviewEditRequest(
        model=model,
        revision=revision,
        input=input_message(prompt),
        target=target_message(target),
        probes=[probe_message(probe) for probe in probes],
    )
    set_edit(request, edit)
    response: edits_pb2.PreviewEditResponse = yield UnaryCall("PreviewEdit", request, timeout)
    return EditPreview.from_message(response)
