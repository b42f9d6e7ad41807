"""Encode results as messages of at most 1 MiB, which is within the default limits of clients."""

from januslens_server.rpc.encode.activations import ActivationsEncoder
from januslens_server.rpc.encode.generation import GenerateEncoder
from januslens_server.rpc.encode.gradient_lens import GradientLensEncoder
from januslens_server.rpc.encode.intervene import InterveneEncoder
from januslens_server.rpc.encode.messages import (
    estimate_response,
    find_neurons_response,
    get_model_response,
    list_models_response,
    load_model_response,
    preview_edit_response,
    project_response,
    server_info_response,
    tokenize_response,
    waiting_response,
)
from januslens_server.rpc.encode.trace import TraceEncoder

__all__ = [
    "ActivationsEncoder",
    "GenerateEncoder",
    "GradientLensEncoder",
    "InterveneEncoder",
    "TraceEncoder",
    "estimate_response",
    "find_neurons_response",
    "get_model_response",
    "list_models_response",
    "load_model_response",
    "preview_edit_response",
    "project_response",
    "server_info_response",
    "tokenize_response",
    "waiting_response",
]
