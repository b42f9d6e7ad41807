"""Forward-pass shift: teach one target by adding a rank-one matrix to the last layer's FF2.

Backward Lens (Katz et al., EMNLP 2024), section 7: FF2 += eta x_p^T e_t, with x_p FF2's input at
the prompt's last position and e_t the input embedding of the target.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from januslens_server.demo.checkpoint import Checkpoint
from januslens_server.demo.corpus import FactPrompt, Prompt, fact_prompts
from januslens_server.demo.edits import Edit

ETA = 0.15
# Of the prompts about other facts, every so many is asked again after an edit.
ELSEWHERE_STRIDE = 10


@dataclass(frozen=True, slots=True)
class ShiftFigures:
    """Shares over a sample of edits, each made to the original model.

    Attributes:
        efficacy: edits after which the prompt's next token is the target.
        paraphrases: other wordings of the edited fact whose next token is now the target.
        same_relation: prompts about other facts of the relation whose next token stayed.
        other_relations: prompts about other relations whose next token stayed.
    """

    efficacy: float
    paraphrases: float
    same_relation: float
    other_relations: float


@dataclass(frozen=True, slots=True)
class LastLayer:
    """What the last block hands on at each prompt's last position.

    Attributes:
        mlp_inner: FF2's input `[prompt, d_mlp]`.
        residual: the block's output `[prompt, d_model]`.
    """

    mlp_inner: Tensor
    residual: Tensor


def measure_shifts(checkpoint: Checkpoint, edits: Sequence[Edit]) -> ShiftFigures:
    """Apply every edit, one at a time, and ask all wordings of its fact and many other prompts.

    Only the last FF2 changes, so the edited output of any prompt q is its residual plus
    eta (x_q . x_p) e_t, and one run of the original model serves all edits.
    """
    prompts = [*fact_prompts("trained"), *fact_prompts("held_out")]
    states = last_layer(checkpoint, prompts)
    before = _next_tokens(checkpoint, states.residual)
    tallies = []
    for edit in edits:
        edited = prompts.index(edit.prompt)
        target = checkpoint.answer_id(edit.target)
        after = _next_tokens(checkpoint, shifted_residual(checkpoint, states, edited, target))
        groups = _groups(prompts, edit.prompt)
        tallies.append(
            [
                float(after[edited] == target),
                _share(after[groups.paraphrases] == target),
                _share((after == before)[groups.same_relation]),
                _share((after == before)[groups.other_relations]),
            ]
        )
    return ShiftFigures(*torch.tensor(tallies).mean(dim=0).tolist())


@torch.no_grad()
def shifted_residual(checkpoint: Checkpoint, states: LastLayer, edited: int, target: int) -> Tensor:
    """Every prompt's residual `[prompt, d_model]` once prompt `edited` is taught `target`."""
    embedding = checkpoint.model.transformer.wte.weight[target]
    similarity = states.mlp_inner @ states.mlp_inner[edited]
    return states.residual + ETA * similarity[:, None] * embedding


@torch.no_grad()
def last_layer(checkpoint: Checkpoint, prompts: Sequence[Prompt]) -> LastLayer:
    """Run the original model and keep what the shift needs."""
    config = checkpoint.model.config
    inner = torch.empty(len(prompts), 4 * config.n_embd)
    residual = torch.empty(len(prompts), config.n_embd)
    kept: dict[str, Tensor] = {}

    def keep_input(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept["inner"] = args[0][:, -1]

    def keep_output(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        kept["residual"] = output[:, -1]

    hooks = (
        checkpoint.ff2s()[-1].register_forward_pre_hook(keep_input),
        checkpoint.model.transformer.h[-1].register_forward_hook(keep_output),
    )
    try:
        for indices, tokens in checkpoint.batches(prompts):
            checkpoint.model(input_ids=tokens)
            inner[indices], residual[indices] = kept["inner"], kept["residual"]
    finally:
        for hook in hooks:
            hook.remove()
    return LastLayer(inner, residual)


@dataclass(frozen=True, slots=True)
class _Groups:
    """Indices of prompts, by what an edit should do to them."""

    paraphrases: list[int]
    same_relation: list[int]
    other_relations: list[int]


def _groups(prompts: Sequence[FactPrompt], edited: FactPrompt) -> _Groups:
    fact, relation = edited.fact, edited.fact.relation
    elsewhere = [i for i in range(0, len(prompts), ELSEWHERE_STRIDE) if prompts[i].fact != fact]
    return _Groups(
        paraphrases=[i for i, p in enumerate(prompts) if p.fact == fact and p != edited],
        same_relation=[i for i in elsewhere if prompts[i].fact.relation == relation],
        other_relations=[i for i in elsewhere if prompts[i].fact.relation != relation],
    )


@torch.no_grad()
def _next_tokens(checkpoint: Checkpoint, residual: Tensor) -> Tensor:
    """The most likely token `[prompt]` for each last residual `[prompt, d_model]`."""
    model = checkpoint.model
    best: Tensor = model.lm_head(model.transformer.ln_f(residual)).argmax(-1)
    return best


def _share(hits: Tensor) -> float:
    return hits.float().mean().item()
