"""Capture a model's activations during a forward pass: taps, hooks and the captured tensors."""

from januslens_server.capture.activations import LayerActivations, Routing
from januslens_server.capture.hooks import capturing
from januslens_server.capture.interruption import interruptible
from januslens_server.capture.overlay import LinearOverlay, LowRank, Overlay, overlaid
from januslens_server.capture.rotation import Rotation
from januslens_server.capture.taps import End, Tap

__all__ = [
    "End",
    "LayerActivations",
    "LinearOverlay",
    "LowRank",
    "Overlay",
    "Rotation",
    "Routing",
    "Tap",
    "capturing",
    "interruptible",
    "overlaid",
]
