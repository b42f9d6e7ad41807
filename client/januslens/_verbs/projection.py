"""The caller's own vectors in a model's vocabulary."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from januslens._requests.inputs import TargetLike, optional_count, target_message
from januslens._results.kinds import LENSES, Lens
from januslens._results.projection import Projection, Projections
from januslens._results.tensors import tensor_message
from januslens._results.tokens import TokenTable
from januslens._verbs.calls import Exchange, UnaryCall
from januslens.v1 import lens_pb2


def project(
    vectors: ArrayLike,
    *,
    target: TargetLike | None = None,
    lens: Lens | str = Lens.FINAL_NORM,
    top_k: int | None = None,
    bottom_k: int | None = None,
    model: str = "",
    timeout: float | None = None,
) -> Exchange[Projections]:
    """Vectors of your own, e.g. probes or dictionary features, through a model's lens.

    Args:
        vectors: `[d_model]` or `[n, d_model]`, in the basis of the residual stream.
        target: The one token (literal text or id) whose rank is to be reported.
        lens: `FINAL_NORM`, `NORMALIZED` (each vector scaled to length 1 first) or `RAW`.
        top_k: How many of the most likely tokens; None = the server's default, 0 = none.
        bottom_k: How many of the least likely tokens, likewise.
        model: Its name; empty = the only one resident.
        timeout: Seconds to wait.

    Returns:
        One projection a vector.

    Raises:
        TypeError: The vectors are not real numbers.
        ValueError: They have another shape, or an argument is impossible.
        JanuslensError: The call failed; see `januslens.errors` for the kinds.
    """
    rows = np.asarray(vectors)
    if rows.ndim not in (1, 2) or rows.size == 0:
        raise ValueError(f"expected vectors of shape [d_model] or [n, d_model]; got {rows.shape}")
    request = lens_pb2.ProjectRequest(
        model=model,
        vectors=tensor_message(np.atleast_2d(rows)),
        lens=LENSES.number(Lens.of(lens)),
        target=None if target is None else target_message(target),
        top_k=optional_count(top_k, "top_k"),
        bottom_k=optional_count(bottom_k, "bottom_k"),
    )
    response: lens_pb2.ProjectResponse = yield UnaryCall("Project", request, timeout)
    tokens = TokenTable(response.tokens)
    return Projections(Projection.from_message(found, tokens) for found in response.projections)
