"""Capture returns the tensors of the pass themselves, and leaves no hooks, even after errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from januslens_server.capture import End, Tap, capturing
from januslens_server.capture.hooks import select


class Block(nn.Module):
    """Passes its residual by keyword and returns a tuple, as some families do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, *, hidden_states: torch.Tensor) -> tuple[torch.Tensor, str]:
        mapped: torch.Tensor = self.linear(hidden_states)
        return mapped[..., :4], "more"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(hidden_states=x)[0]
        return x


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(1, 5, 4)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def block(model: Model, i: int) -> Block:
    found = model.blocks[i]
    assert isinstance(found, Block)
    return found


def every_tap(model: Model) -> dict[tuple[int, End], Tap]:
    return {(i, end): Tap(block(model, i), end) for i in range(3) for end in End}


def test_captured_tensors_equal_those_of_the_model(model: Model, x: torch.Tensor) -> None:
    taps = every_tap(model)
    with capturing(taps) as captured:
        output = model(x)
    assert captured[0, End.INPUT] is x
    assert captured[2, End.OUTPUT] is output
    for i in range(2):
        assert captured[i, End.OUTPUT] is captured[i + 1, End.INPUT]


def test_capture_changes_no_result(model: Model, x: torch.Tensor) -> None:
    alone = model(x)
    with capturing(every_tap(model), lambda: None, model.blocks):
        assert torch.equal(model(x), alone)


@pytest.mark.parametrize("columns", [range(2, 5), (0, 5, 3)], ids=["a run", "scattered"])
def test_columns_of_a_fused_map_are_sliced(
    model: Model, x: torch.Tensor, columns: range | tuple[int, ...]
) -> None:
    linear = block(model, 1).linear
    taps = {"some": Tap(linear, End.OUTPUT, columns), "all": Tap(linear, End.OUTPUT)}
    with capturing(taps) as captured:
        model(x)
    assert captured["all"].shape == (1, 5, 6)
    assert torch.equal(captured["some"], captured["all"][..., list(columns)])


def test_gradients_reach_captured_tensors(model: Model, x: torch.Tensor) -> None:
    taps = every_tap(model)
    with capturing(taps) as captured:
        output = model(x)
    inner = captured[1, End.OUTPUT]
    (gradient,) = torch.autograd.grad(output.sum(), [inner])
    assert gradient.shape == inner.shape
    assert gradient.abs().sum() > 0


def test_a_checkpoint_comes_before_every_named_module(model: Model, x: torch.Tensor) -> None:
    seen: list[int] = []
    with capturing(every_tap(model), lambda: seen.append(len(captured)), model.blocks) as captured:
        model(x)
    assert seen == [0, 2, 4]


def fail_in_the_model(model: Model, x: torch.Tensor) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    handle = block(model, 1).linear.register_forward_hook(broken)
    try:
        with capturing(every_tap(model), lambda: None, model.blocks):
            model(x)
    finally:
        handle.remove()


def fail_in_the_checkpoint(model: Model, x: torch.Tensor) -> None:
    calls: list[None] = []

    def check_cancelled() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("broken")

    with capturing(every_tap(model), check_cancelled, model.blocks):
        model(x)


def fail_in_the_body(model: Model, x: torch.Tensor) -> None:
    with capturing(every_tap(model), lambda: None, model.blocks):
        model(x)
        raise RuntimeError("broken")


def fail_at_a_tap(model: Model, x: torch.Tensor) -> None:
    with capturing({0: Tap(block(model, 1), End.OUTPUT, argument=9)}, lambda: None, model.blocks):
        model(x)


@pytest.mark.parametrize(
    "fail", [fail_in_the_model, fail_in_the_checkpoint, fail_in_the_body, fail_at_a_tap]
)
def test_hooks_are_removed_after_a_failure(
    model: Model, x: torch.Tensor, fail: Callable[[Model, torch.Tensor], None]
) -> None:
    before = model(x)
    with pytest.raises((RuntimeError, TypeError)):
        fail(model, x)
    assert hooks(model) == 0
    assert torch.equal(model(x), before)


def test_hooks_are_removed_after_a_success(model: Model, x: torch.Tensor) -> None:
    with capturing(every_tap(model), lambda: None, model.blocks):
        assert hooks(model) == 9
        model(x)
    assert hooks(model) == 0


def test_columns_read_in_inference_mode_serve_a_later_pass_with_gradients() -> None:
    columns = (5, 0, 2)
    values = torch.arange(6.0).reshape(1, 6)
    with torch.inference_mode():
        assert select(values, columns).tolist() == [[5, 0, 2]]
    whole = values.clone().requires_grad_()
    (select(whole, columns) ** 2).sum().backward()
    assert whole.grad is not None
    assert whole.grad.tolist() == [[0, 0, 4, 0, 0, 10]]
