"""Encode results as messages of at most 1 MiB, which is within the default limits of clients."""

from januslens_server.rpc.encode.activations import ActivationsEncoder
from januslens_server.rpc.encode.generation import GenerateEncoder
from januslens_server.rpc.encode.gradient_lens import GradientLensEncoder
from januslens_server.rpc.encode.intervene import InterveneEncoder
from januslens_server.rpc.encode.messages import (
    estimate_message,
    find_neurons_response,
    model_message,
    preview_edit_response,
    project_response,
    provenance_message,
    server_info_response,
    token_message,
)
from januslens_server.rpc.encode.trace import TraceEncoder

__all__ = [
    "ActivationsEncoder",
    "GenerateEncoder",
    "GradientLensEncoder",
    "InterveneEncoder",
    "TraceEncoder",
    "estimate_message",
    "find_neurons_response",
    "model_message",
    "preview_edit_response",
    "project_response",
    "provenance_message",
    "server_info_response",
    "token_message",
]
