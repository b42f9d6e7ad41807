"""What FF2's gradients look like: where they are large, and where the target stands in their lens.

After Backward Lens (Katz et al., EMNLP 2024): the VJP of a layer's second MLP matrix has the target
at the bottom of its projection, and is largest at the last token and at the subject's last.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from januslens_server.demo.checkpoint import Checkpoint
from januslens_server.demo.edits import Edit


@dataclass(frozen=True, slots=True)
class VjpFigures:
    """Means over a sample of edits, one entry per layer from the bottom.

    Attributes:
        target_rank: the target's rank in the normalised lens of FF2's VJP at the last position,
            divided by the lowest rank: 1.0 is the very bottom, the end a descent step promotes.
        dominance: how often the largest VJP stands at the last or the subject's last position. In
            the last layer only the last position has a gradient at all.
    """

    target_rank: tuple[float, ...]
    dominance: tuple[float, ...]


def measure_vjps(checkpoint: Checkpoint, edits: Sequence[Edit]) -> VjpFigures:
    """Gradients of -log p(target | prompt) for every edit."""
    ranks, dominated = [], []
    for edit in edits:
        target = checkpoint.answer_id(edit.target)
        deltas = ff2_vjps(checkpoint, checkpoint.encode(edit.prompt.text), target)
        ranks.append([_normalised_rank(checkpoint, delta[-1], target) for delta in deltas])
        expected = {deltas.shape[1] - 1, checkpoint.last_subject_position(edit.prompt)}
        largest = deltas.norm(dim=-1).argmax(dim=-1).tolist()
        dominated.append([float(position in expected) for position in largest])
    return VjpFigures(_column_means(ranks), _column_means(dominated))


def ff2_vjps(checkpoint: Checkpoint, ids: list[int], target: int) -> Tensor:
    """Gradients of -log p(target) at every FF2's output: `[layer, pos, d_model]`."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output)

    hooks = [ff2.register_forward_hook(keep) for ff2 in checkpoint.ff2s()]
    try:
        logits: Tensor = checkpoint.model(input_ids=torch.tensor([ids])).logits[0, -1]
    finally:
        for hook in hooks:
            hook.remove()
    loss = -logits.log_softmax(-1)[target]
    return torch.cat(torch.autograd.grad(loss, outputs))


@torch.no_grad()
def _normalised_rank(checkpoint: Checkpoint, delta: Tensor, target: int) -> float:
    """How many tokens stand above the target in the lens of `delta` `[d_model]`, as a share."""
    model = checkpoint.model
    logits = model.lm_head(model.transformer.ln_f(nn.functional.normalize(delta, dim=0)))
    above = int((logits > logits[target]).sum())
    return above / (len(logits) - 1)


def _column_means(rows: list[list[float]]) -> tuple[float, ...]:
    return tuple(torch.tensor(rows).mean(dim=0).tolist())
