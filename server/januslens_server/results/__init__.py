"""Result records: what the pipelines yield and `rpc.encode` turns into messages.

They hold plain Python values and numpy arrays, so that no later stage touches the device.
"""

from januslens_server.results.answers import Cost, EditPreview, Effect, FoundNeurons
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
from januslens_server.results.models import (
    Guarantee,
    ModelFacts,
    ModelState,
    ModelStatus,
    Provenance,
)
from januslens_server.results.trace import (
    Edge,
    LayerGraph,
    Node,
    PositionTarget,
    TraceEvent,
    TraceHeader,
    TraceSummary,
)
from januslens_server.results.values import (
    EdgeKind,
    End,
    Flags,
    Floats,
    Ints,
    MatrixKind,
    NodeKind,
    ProjectionTable,
    Side,
    StageTime,
    Token,
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
