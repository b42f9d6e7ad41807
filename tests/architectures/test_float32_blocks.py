"""The float32 check of blocks detects missing parts below the tolerance of half types."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from januslens_server.pipelines.self_check import block_errors, self_check
from tests.architectures.cases import CASES, MIXTURES, Case
from tests.architectures.tiny_models import resident

SOME = [*CASES[::6], *MIXTURES[::2]]


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
def test_block_parts_add_up_and_weights_stay_unchanged(case: Case) -> None:
    model = resident(case, torch.bfloat16)
    before = {name: t.data_ptr() for name, t in model.network.state_dict().items()}
    errors = block_errors(model, case.prompt)
    assert list(errors) == list(range(model.view.facts.n_layers))
    assert max(errors.values()) <= 1e-5
    after = model.network.state_dict()
    assert {name: t.data_ptr() for name, t in after.items()} == before
    assert {t.dtype for t in after.values() if t.is_floating_point()} == {torch.bfloat16}


def test_part_below_bfloat16_tolerance_is_detected() -> None:
    model = resident(next(c for c in CASES if c.id == "llama-grouped"), torch.bfloat16)

    def add(_module: Any, _args: Any, output: Any) -> Any:
        whole = output if isinstance(output, torch.Tensor) else output[0]
        more = whole + 0.004 * whole.abs().mean()
        return more if isinstance(output, torch.Tensor) else (more, *output[1:])

    handle = model.view.blocks[0].module.register_forward_hook(add)
    try:
        *of_trace, in_float32 = self_check(model)
    finally:
        handle.remove()
    assert all(guarantee.held for guarantee in of_trace)
    assert not in_float32.held
    assert self_check(model)[-1].held
