"""Arguments of a projection."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from januslens._requests.inputs import TargetLike, count, target_message
from januslens._results.kinds import LENSES, Lens
from januslens._results.tensors import tensor_message
from januslens.v1 import lens_pb2


def project_request(
    vectors: ArrayLike,
    *,
    target: TargetLike | None,
    lens: Lens | str,
    top_k: int | None,
    bottom_k: int | None,
    model: str,
) -> lens_pb2.ProjectRequest:
    """The request; `januslens.Client.project` says what each argument means.

    Raises:
        TypeError: The vectors are not real numbers.
        ValueError: They are neither one vector nor rows of vectors.
    """
    rows = np.asarray(vectors)
    if rows.ndim not in (1, 2) or rows.size == 0:
        raise ValueError(f"expected vectors of shape [d_model] or [n, d_model]; got {rows.shape}")
    return lens_pb2.ProjectRequest(
        model=model,
        vectors=tensor_message(np.atleast_2d(rows)),
        lens=LENSES.number(Lens.of(lens)),
        target=None if target is None else target_message(target),
        top_k=count(top_k, "top_k"),
        bottom_k=count(bottom_k, "bottom_k"),
    )
