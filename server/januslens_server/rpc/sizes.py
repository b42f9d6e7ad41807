"""What a request's line in the log says of its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from januslens_server.results import (
    EditPreview,
    FoundNeurons,
    GradientHeader,
    GradientSummary,
    ProjectionTable,
    StageTime,
    TraceHeader,
    TraceSummary,
)

# Of answers of one message.
_OF_ONE: tuple[tuple[type, str, Callable[[Any], int]], ...] = (
    (EditPreview, "prompts", lambda preview: 1 + len(preview.probes)),
    (FoundNeurons, "neurons", lambda found: len(found.neurons)),
    (ProjectionTable, "vectors", lambda table: len(table.projected)),
)


def sizes_of(result: object) -> dict[str, Any]:
    """The sizes that this result tells, and the seconds by stage; of most results nothing."""
    if isinstance(result, TraceHeader | GradientHeader):
        return {"tokens": len(result.prompt_tokens)}
    if isinstance(result, TraceSummary):
        return {"nodes": result.nodes, "edges": result.edges, "stages": _stages(result.times)}
    if isinstance(result, GradientSummary):
        return {"matrices": result.matrices, "stages": _stages(result.times)}
    return {name: size(result) for kind, name, size in _OF_ONE if isinstance(result, kind)}


def _stages(times: Sequence[StageTime]) -> dict[str, float]:
    return {time.stage: round(time.seconds, 6) for time in times}
