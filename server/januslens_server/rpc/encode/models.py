"""The state of a model as a message."""

from __future__ import annotations

from dataclasses import asdict

from januslens.v1 import models_pb2
from januslens_server.results import ModelStatus
from januslens_server.rpc.encode.shared import guarantee_messages, provenance_message


def model_message(status: ModelStatus) -> models_pb2.Model:
    """Sizes and provenance only once the model is loaded."""
    message = models_pb2.Model(
        name=status.name,
        state=models_pb2.Model.State.ValueType(status.state),
        state_reason=status.reason,
        guarantees=guarantee_messages(status.guarantees),
        **({} if status.facts is None else asdict(status.facts)),
    )
    if status.provenance is not None:
        message.provenance.CopyFrom(provenance_message(status.provenance))
    return message
