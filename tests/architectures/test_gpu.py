"""A GPU gives the numbers of the CPU, for one model of each kind, and the same ones again.

`test_second_device.py` finds tensors on the wrong device without a GPU. This finds wrong kernels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.self_check import self_check
from tests.architectures.cases import MEASURED, Case
from tests.architectures.test_second_device import CHOSEN
from tests.architectures.tiny_models import resident
from tests.benchmarks.gpu import TOLERANCE, difference, readings
from tests.support.second_device import moved, second_device

LLAMA = next(case for case in MEASURED if case.id == "llama-grouped")


def on_gpu(network: nn.Module) -> nn.Module:
    return network.to("cuda")


def assert_numbers_of_the_cpu(model: ResidentModel, case: Case) -> None:
    for name, read in readings(tuple(case.prompt)).items():
        found, again, expected = read(model), read(model), read(resident(case))
        for own, other in zip(found, expected, strict=True):
            assert difference(own, other) <= TOLERANCE, name
        for one, other in zip(found, again, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.id)
def test_numbers_of_a_gpu_are_those_of_the_cpu(case: Case) -> None:
    model = resident(case, torch.float32, on_gpu)
    assert all(guarantee.held for guarantee in self_check(model))
    assert_numbers_of_the_cpu(model, case)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.id)
def test_guarantees_hold_on_a_gpu_in_bfloat16(case: Case) -> None:
    model = resident(case, torch.bfloat16, on_gpu)
    found = self_check(model)
    assert all(guarantee.held for guarantee in found), found


def test_the_comparison_itself_runs_without_a_gpu() -> None:
    with second_device():
        assert_numbers_of_the_cpu(resident(LLAMA, torch.float32, moved), LLAMA)
    other = torch.ones(3)
    assert difference(other.numpy(), 1.001 * other.numpy()) > TOLERANCE
