"""Capture a model's activations during a forward pass: taps, hooks and the captured tensors."""

from januslens_server.capture.activations import (
    OF_ATTENTION,
    OF_MLP,
    HiddenSources,
    LayerActivations,
    NeuronChange,
    Rotation,
    Routing,
    StreamActivations,
)
from januslens_server.capture.hooks import (
    End,
    LinearOverlay,
    LowRank,
    Overlay,
    Tap,
    capturing,
    overlaid,
    rewriting,
)
from januslens_server.capture.interruption import interruptible

__all__ = [
    "OF_ATTENTION",
    "OF_MLP",
    "End",
    "HiddenSources",
    "LayerActivations",
    "LinearOverlay",
    "LowRank",
    "NeuronChange",
    "Overlay",
    "Rotation",
    "Routing",
    "StreamActivations",
    "Tap",
    "capturing",
    "interruptible",
    "overlaid",
    "rewriting",
]
