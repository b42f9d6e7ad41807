"""Compare factors in half precision with dense gradients by autograd on the same model."""

from __future__ import annotations

import pytest
import torch

from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.resolve import resolve_gradient_lens
from januslens_server.results import NAMED_KINDS, GradientMatrix
from januslens_server.specs import GradientLensSpec, LensSpec, NegativeLogLikelihood
from tests.architectures.cases import CASES, Case
from tests.architectures.tiny_models import resident

FIRST_OF_EACH_FAMILY = tuple({case.family: case for case in reversed(CASES)}.values())


@pytest.mark.parametrize("case", FIRST_OF_EACH_FAMILY, ids=lambda case: case.id)
@pytest.mark.parametrize("data_type", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_factors_are_the_dense_gradients(case: Case, data_type: torch.dtype) -> None:
    spec = GradientLensSpec(
        tuple(case.prompt),
        NegativeLogLikelihood((7,)),
        matrices=NAMED_KINDS,
        lens=LensSpec(0, 0),
        verify=True,
    )
    events = gradient_lens(resolve_gradient_lens(resident(case, data_type), spec), lambda: None)
    matrices = [event for event in events if isinstance(event, GradientMatrix)]
    assert matrices
    for matrix in matrices:
        assert matrix.verification is not None
        assert matrix.verification.measured_error <= 5e-3, (matrix.layer, matrix.kind)
