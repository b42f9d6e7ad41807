"""Dense gradients of a plain Hugging Face model, computed by autograd on its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.resolve import resolve_gradient_lens
from januslens_server.results import (
    GradientEvent,
    GradientHeader,
    GradientMatrix,
    GradientSummary,
    MatrixKind,
)
from januslens_server.specs import GradientLensSpec

Key = tuple[int, MatrixKind]
Loss = Callable[[Any], Tensor]

_SEPARATE = {MatrixKind.Q: "q_proj", MatrixKind.K: "k_proj", MatrixKind.V: "v_proj"}

# The modules of a block's matrices, by family; a kind in a fused module is a third of it.
_NAMES: dict[str, dict[MatrixKind, str]] = {
    "gpt2": dict.fromkeys(_SEPARATE, "attn.c_attn")
    | {
        MatrixKind.O: "attn.c_proj",
        MatrixKind.FF1: "mlp.c_fc",
        MatrixKind.FF2: "mlp.c_proj",
    },
    "gpt_neo": {kind: f"attn.attention.{name}" for kind, name in _SEPARATE.items()}
    | {
        MatrixKind.O: "attn.attention.out_proj",
        MatrixKind.FF1: "mlp.c_fc",
        MatrixKind.FF2: "mlp.c_proj",
    },
    "gptj": {kind: f"attn.{name}" for kind, name in _SEPARATE.items()}
    | {
        MatrixKind.O: "attn.out_proj",
        MatrixKind.FF1: "mlp.fc_in",
        MatrixKind.FF2: "mlp.fc_out",
    },
    "llama": {kind: f"self_attn.{name}" for kind, name in _SEPARATE.items()}
    | {
        MatrixKind.O: "self_attn.o_proj",
        MatrixKind.GATE: "mlp.gate_proj",
        MatrixKind.UP: "mlp.up_proj",
        MatrixKind.FF2: "mlp.down_proj",
    },
}


def kinds_of(network: Any) -> set[MatrixKind]:
    """Return the kinds of matrices that the family has."""
    return set(_NAMES[network.config.model_type])


def blocks_of(network: Any) -> nn.ModuleList:
    """Return the blocks in order."""
    body = network.base_model
    blocks: nn.ModuleList = body.layers if hasattr(body, "layers") else body.h
    return blocks


def dense_gradients(network: Any, loss: Loss) -> dict[Key, Tensor]:
    """dL/dW `[d_in, d_out]` in float64 of every matrix; `loss` is called with the network."""
    network.zero_grad()
    loss(network).backward()
    gradients = {}
    for layer, block in enumerate(blocks_of(network)):
        for kind, name in _NAMES[network.config.model_type].items():
            module: Any = block.get_submodule(name)
            gradient = module.weight.grad.double().clone()
            if isinstance(module, nn.Linear):
                gradient = gradient.T
            if name == "attn.c_attn":
                gradient = gradient.chunk(3, dim=1)[list(_SEPARATE).index(kind)]
            gradients[layer, kind] = gradient
    network.zero_grad()
    return gradients


def nll(prompt: Sequence[int], targets: Sequence[int]) -> Loss:
    """Return the loss, with each target run separately after its own prefix."""

    def loss(network: Any) -> Tensor:
        total = torch.zeros(())
        for i, target in enumerate(targets):
            total = total - log_probabilities(network, [*prompt, *targets[:i]])[target]
        return total

    return loss


def logit_difference(prompt: Sequence[int], preferred: int, other: int) -> Loss:
    """logit(other) - logit(preferred) after the prompt."""

    def loss(network: Any) -> Tensor:
        logits = last_logits(network, prompt)
        return logits[other] - logits[preferred]

    return loss


def suppression(prompt: Sequence[int], suppressed: Sequence[int]) -> Loss:
    """KL(q || p): q is p without the suppressed tokens, renormalised and constant.

    Computed in float64 from the logits on, because q and p differ little.
    """

    def loss(network: Any) -> Tensor:
        p = last_logits(network, prompt).double().softmax(0)
        q = p.detach().clone()
        q[list(suppressed)] = 0
        q = q / q.sum()
        total = torch.zeros(())
        for token in q.nonzero()[:, 0].tolist():
            total = total + q[token] * (q[token].log() - p[token].log())
        return total

    return loss


def last_logits(network: Any, ids: Sequence[int]) -> Tensor:
    logits: Tensor = network(input_ids=torch.tensor([list(ids)]), use_cache=False).logits
    return logits[0, -1]


def log_probabilities(network: Any, ids: Sequence[int]) -> Tensor:
    return last_logits(network, ids).log_softmax(0)


class Factorised:
    """The server's result: header, matrices by layer and kind in the order sent, summary."""

    def __init__(self, events: Sequence[GradientEvent]) -> None:
        header, *matrices, summary = events
        assert isinstance(header, GradientHeader)
        assert isinstance(summary, GradientSummary)
        self.header, self.summary = header, summary
        self.matrices: Mapping[Key, GradientMatrix] = {
            (matrix.layer, matrix.kind): matrix
            for matrix in matrices
            if isinstance(matrix, GradientMatrix)
        }
        assert len(self.matrices) == len(matrices) == summary.matrices

    def outer_products(self, key: Key) -> Tensor:
        """Return the sum of x_i^T delta_i `[d_in, d_out]` in float64."""
        part = self.matrices[key].components
        assert part.inputs is not None
        assert part.vjps is not None
        x, delta = torch.from_numpy(part.inputs).double(), torch.from_numpy(part.vjps).double()
        return torch.einsum("ni,nj->ij", x, delta)


def run_gradient(model: ResidentModel, spec: GradientLensSpec) -> Factorised:
    return Factorised(list(gradient_lens(resolve_gradient_lens(model, spec), lambda: None)))
