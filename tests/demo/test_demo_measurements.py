"""The measurements of the demo model agree with autograd and with edited weights."""

import copy

import pytest
import torch
from torch import Tensor, nn

from demo_training import evaluate
from demo_training.corpus import fact_prompts
from demo_training.evaluate import Figure
from demo_training.measurements import (
    ETA,
    DemoModel,
    ff2_vjps,
    last_layer,
    measure_vjps,
    sample_edits,
    shifted_residual,
)
from januslens_server.demo import model_path

DEMO = DemoModel.load(model_path())


def ff2_inputs(demo: DemoModel, ids: list[int]) -> list[Tensor]:
    """FF2's input `[pos, d_mlp]` in every layer."""
    inputs: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0][0])

    hooks = [ff2.register_forward_pre_hook(keep) for ff2 in demo.ff2s()]
    demo.model(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return inputs


def test_inputs_times_vjps_are_the_gradients_of_ff2() -> None:
    ids = DEMO.encode("The capital of Japan is the city of")
    target = DEMO.answer_id("Paris")
    loss = -DEMO.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)[target]
    weights = [ff2.get_parameter("weight") for ff2 in DEMO.ff2s()]
    expected = torch.autograd.grad(loss, weights)
    deltas, inputs = ff2_vjps(DEMO, ids, target), ff2_inputs(DEMO, ids)
    for x, delta, gradient in zip(inputs, deltas, expected, strict=True):
        assert (x.T @ delta - gradient).norm() / gradient.norm() < 1e-5


def test_the_shift_is_what_an_edited_ff2_computes() -> None:
    prompts = fact_prompts("trained")[:5]
    target = DEMO.answer_id("Paris")
    states = last_layer(DEMO, prompts)
    edited = DemoModel(copy.deepcopy(DEMO.model), DEMO.tokenizer)
    with torch.no_grad():
        embedding = DEMO.model.transformer.wte.weight[target]
        edited.ff2s()[-1].get_parameter("weight").add_(
            ETA * torch.outer(states.mlp_inner[2], embedding)
        )
    expected = last_layer(edited, prompts).residual
    torch.testing.assert_close(shifted_residual(DEMO, states, 2, target), expected)


def test_the_target_is_ranked_last_in_the_vjps() -> None:
    measured = measure_vjps(DEMO, sample_edits(stride=200))
    assert min(measured.target_rank) > 0.97
    assert min(measured.dominance) > 0.9


def test_an_edits_target_is_another_answer_of_the_relation() -> None:
    for edit in sample_edits(stride=1):
        answers = {
            p.answer
            for p in fact_prompts("held_out")
            if p.fact.relation == edit.prompt.fact.relation
        }
        assert edit.target in answers - {edit.prompt.answer}


def test_the_last_subject_position_is_the_subjects_last_token() -> None:
    [messi] = [
        p
        for p in fact_prompts("trained") + fact_prompts("held_out")
        if p.text == "Lionel Messi plays for"
    ]
    assert DEMO.last_subject_position(messi) == 1


def test_an_answer_of_several_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 'Zqxv' to be one token, got 5"):
        DEMO.answer_id("Zqxv")


def test_the_command_names_figures_below_their_floor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = (Figure("recall", 1.0, 1.0), Figure("shift", 0.5, 0.93), Figure("other", 0.1, 0.0))
    monkeypatch.setattr("sys.argv", ["evaluate"])
    monkeypatch.setattr(evaluate, "evaluate", lambda _folder: figures)
    with pytest.raises(SystemExit, match=r"^fell short: shift$"):
        evaluate.main()
    assert "0.5000  (at least 0.930)  FELL SHORT" in capsys.readouterr().out
