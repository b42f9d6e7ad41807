"""Readings in the vocabulary against naive float64 softmaxes and the model's own logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from januslens_server.lens.head import LensHead
from januslens_server.lens.norm import Norm
from januslens_server.lens.projection import project
from januslens_server.specs import LensKind, LensSpec
from tests.support.reference_lens import softmax


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 5.0])
def test_entropy_over_a_wide_vocabulary(spread: float) -> None:
    """Rounding must not add up with the vocabulary: near uniform, every term rounds alike."""
    random = torch.Generator().manual_seed(0)
    unembedding = torch.randn(50_257, 8, generator=random) * spread
    vectors = torch.randn(5, 8, generator=random)
    norm = Norm(torch.ones(8), None, 1e-5, centred=False)
    table = project(LensHead(norm, unembedding), vectors, LensSpec(kind=LensKind.RAW))
    wanted = softmax(vectors.double() @ unembedding.double().T).entropy_bits
    assert np.abs(table.entropy_bits - wanted.numpy()).max() <= 5e-5
