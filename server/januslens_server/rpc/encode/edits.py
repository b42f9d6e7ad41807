"""The answer to PreviewEdit as a message."""

from __future__ import annotations

from dataclasses import asdict

from januslens.v1 import edits_pb2
from januslens_server.results import EditPreview, Effect
from januslens_server.rpc.encode.shared import ReadToken, TokenTexts, provenance_message


def preview_edit_response(
    preview: EditPreview, read_token: ReadToken
) -> edits_pb2.PreviewEditResponse:
    """Effects, and the texts of every token that they name."""
    named = {
        token_id
        for effect in (preview.edited, *preview.probes)
        for token_id in (effect.target_token_id, effect.predicted_before, effect.predicted_after)
    }
    return edits_pb2.PreviewEditResponse(
        edited=_effect(preview.edited),
        probes=[_effect(effect) for effect in preview.probes],
        provenance=provenance_message(preview.provenance),
        tokens=TokenTexts(read_token).texts(named),
    )


def _effect(effect: Effect) -> edits_pb2.Effect:
    return edits_pb2.Effect(**asdict(effect))
