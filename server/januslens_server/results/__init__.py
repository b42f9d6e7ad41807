"""Result records: what the pipelines yield and `rpc.encode` turns into messages.

They hold plain Python values and numpy arrays, so that no later stage touches the device.
"""

from januslens_server.results.arrays import Flags, Floats, Ints
from januslens_server.results.cost import Cost
from januslens_server.results.edits import EditPreview, Effect
from januslens_server.results.gradients import (
    Components,
    Entries,
    GradientEvent,
    GradientHeader,
    GradientMatrix,
    GradientSummary,
    NeuronChanges,
    SegmentRow,
    Spectrum,
)
from januslens_server.results.kinds import EdgeKind, End, MatrixKind, NodeKind, Side
from januslens_server.results.models import (
    Guarantee,
    ModelFacts,
    ModelState,
    ModelStatus,
    Provenance,
)
from januslens_server.results.neurons import FoundNeurons
from januslens_server.results.readings import ProjectionTable, StageTime, Token
from januslens_server.results.trace import (
    Edge,
    LayerGraph,
    Node,
    PositionTarget,
    TraceEvent,
    TraceHeader,
    TraceSummary,
)

__all__ = [
    "Components",
    "Cost",
    "Edge",
    "EdgeKind",
    "EditPreview",
    "Effect",
    "End",
    "Entries",
    "Flags",
    "Floats",
    "FoundNeurons",
    "GradientEvent",
    "GradientHeader",
    "GradientMatrix",
    "GradientSummary",
    "Guarantee",
    "Ints",
    "LayerGraph",
    "MatrixKind",
    "ModelFacts",
    "ModelState",
    "ModelStatus",
    "NeuronChanges",
    "Node",
    "NodeKind",
    "PositionTarget",
    "ProjectionTable",
    "Provenance",
    "SegmentRow",
    "Side",
    "Spectrum",
    "StageTime",
    "Token",
    "TraceEvent",
    "TraceHeader",
    "TraceSummary",
]
