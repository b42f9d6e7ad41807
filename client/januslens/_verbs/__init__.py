"""What a client can ask, each verb once: both clients take their methods from here."""

from januslens._verbs.cost import SUMMARY as ESTIMATE_SUMMARY
from januslens._verbs.cost import estimate
from januslens._verbs.edits import preview_edit
from januslens._verbs.gradient_lens import gradient_lens
from januslens._verbs.models import list_models, tokenize
from januslens._verbs.neurons import find_neurons
from januslens._verbs.overview import trace_overview
from januslens._verbs.projection import project
from januslens._verbs.trace import trace

__all__ = [
    "ESTIMATE_SUMMARY",
    "estimate",
    "find_neurons",
    "gradient_lens",
    "list_models",
    "preview_edit",
    "project",
    "tokenize",
    "trace",
    "trace_overview",
]
