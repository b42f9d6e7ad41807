"""See a language model's forward and backward passes in its vocabulary.

The client of the Januslens server; it needs no torch::

    import januslens

    with januslens.Client("127.0.0.1:50051") as client:
        trace = client.trace("The capital of Japan is the city of")
        for part in trace.contributions()[:5]:
            print(f"{part.logit_contribution:+.2f}", part.node)
"""

from januslens import _notebook as _notebook  # registers what notebooks show
from januslens.aio import AsyncClient, AsyncEventStream
from januslens.arguments import (
    DescentStep,
    ForwardShift,
    KlDivergence,
    LogitDifference,
    NegativeLogLikelihood,
    Probe,
    Text,
)
from januslens.assemblers import read_gradient, read_trace
from januslens.client import Client, EventStream
from januslens.errors import (
    Aborted,
    Cancelled,
    DeadlineExceeded,
    DeviceLost,
    ErrorDetails,
    FailedPrecondition,
    FieldViolation,
    GradientInterrupted,
    InternalError,
    InvalidRequest,
    JanuslensError,
    LimitExceeded,
    ModelFailed,
    ModelLoading,
    ModelNotFound,
    NotFinite,
    NotFound,
    OutOfMemory,
    PermissionDenied,
    ProtocolViolation,
    QueueFull,
    QuotaSpent,
    QuotaViolation,
    ReaderStalled,
    ResourceExhausted,
    ServerDraining,
    StreamInterrupted,
    TraceInterrupted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from januslens.results.exports import PageFrame
from januslens.results.gradient import (
    EditPreview,
    Effect,
    Gradient,
    GradientHeader,
    GradientSummary,
    SegmentRow,
)
from januslens.results.graph import Edge, Node, Part
from januslens.results.kinds import EdgeKind, End, Lens, MatrixKind, NodeKind, Side
from januslens.results.matrices import (
    Component,
    Entry,
    Matrix,
    NeuronChange,
    Singular,
    Verification,
)
from januslens.results.models import (
    CostEstimate,
    Guarantee,
    Model,
    Models,
    ModelSizes,
    Provenance,
    StageTime,
)
from januslens.results.tokens import Token, Tokens
from januslens.results.trace import (
    LayerGraph,
    NormEffect,
    PositionTarget,
    Trace,
    TraceHeader,
    TraceSummary,
)
from januslens.results.vectors import (
    FoundNeurons,
    NeuronHit,
    Projection,
    Projections,
    Tensor,
    TokenScore,
)
from januslens.viewer import html as _pages  # noqa: F401 - registers the pages

__all__ = [
    "Aborted",
    "AsyncClient",
    "AsyncEventStream",
    "Cancelled",
    "Client",
    "Component",
    "CostEstimate",
    "DeadlineExceeded",
    "DescentStep",
    "DeviceLost",
    "Edge",
    "EdgeKind",
    "EditPreview",
    "Effect",
    "End",
    "Entry",
    "ErrorDetails",
    "EventStream",
    "FailedPrecondition",
    "FieldViolation",
    "ForwardShift",
    "FoundNeurons",
    "Gradient",
    "GradientHeader",
    "GradientInterrupted",
    "GradientSummary",
    "Guarantee",
    "InternalError",
    "InvalidRequest",
    "JanuslensError",
    "KlDivergence",
    "LayerGraph",
    "Lens",
    "LimitExceeded",
    "LogitDifference",
    "Matrix",
    "MatrixKind",
    "Model",
    "ModelFailed",
    "ModelLoading",
    "ModelNotFound",
    "ModelSizes",
    "Models",
    "NegativeLogLikelihood",
    "NeuronChange",
    "NeuronHit",
    "Node",
    "NodeKind",
    "NormEffect",
    "NotFinite",
    "NotFound",
    "OutOfMemory",
    "PageFrame",
    "Part",
    "PermissionDenied",
    "PositionTarget",
    "Probe",
    "Projection",
    "Projections",
    "ProtocolViolation",
    "Provenance",
    "QueueFull",
    "QuotaSpent",
    "QuotaViolation",
    "ReaderStalled",
    "ResourceExhausted",
    "SegmentRow",
    "ServerDraining",
    "Side",
    "Singular",
    "StageTime",
    "StreamInterrupted",
    "Tensor",
    "Text",
    "Token",
    "TokenScore",
    "Tokens",
    "Trace",
    "TraceHeader",
    "TraceInterrupted",
    "TraceSummary",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Verification",
    "read_gradient",
    "read_trace",
]
