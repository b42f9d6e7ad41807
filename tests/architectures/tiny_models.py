"""Build each case's random model, as a plain Hugging Face model and as the server loads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from januslens_server.models.adapters import view_of
from januslens_server.models.resident import ResidentModel
from januslens_server.models.tokenizer import Vocabulary
from januslens_server.results import Provenance
from tests.architectures.cases import Case

TOKENIZER = Path(__file__).parents[1] / "numerics" / "goldens" / "tokenizer"

# Their norms multiply by 1 + weight.
LESS_ONE = ("Gemma", "NemotronLayerNorm", "VaultGemma")


@cache
def plain(case: Case) -> Any:
    """Build the plain Hugging Face model in float32."""
    torch.manual_seed(len(case.id))
    network: Any = AutoModelForCausalLM.from_config(
        case.config(), attn_implementation=case.attention
    )
    with torch.no_grad():
        for module, name, parameter in _parameters(network):
            parameter.copy_(_drawn(module, name, parameter.shape))
        for name, buffer in network.named_buffers():
            if name.endswith(
                ("e_score_correction_bias", "expert_bias")
            ):  # of routers; 0 by default
                buffer.copy_(0.2 * torch.randn(buffer.shape))
            elif name.endswith("layer_scalar"):  # of what a block returns; 1 by default
                buffer.copy_(0.5 + torch.rand(buffer.shape))
    return network.eval()


@cache
def resident(
    case: Case,
    data_type: torch.dtype = torch.float32,
    prepare: Callable[[nn.Module], object] | None = None,
) -> ResidentModel:
    """Build the resident model with the same weights and the family's default attention.

    `prepare` is called with the network before it is read.
    """
    network = AutoModelForCausalLM.from_config(case.config(), dtype=data_type)
    network.load_state_dict(plain(case).state_dict())
    network.eval().requires_grad_(requires_grad=False)
    if prepare is not None:
        prepare(network)
    provenance = Provenance(
        model=case.id,
        revision="",
        architecture=type(network).__name__,
        data_type=str(data_type).removeprefix("torch."),
        device="cpu",
        attention=network.config._attn_implementation,
        versions={},
    )
    return ResidentModel(case.id, network, view_of(network), _vocabulary(), provenance)


@cache
def _vocabulary() -> Vocabulary:
    return Vocabulary(Tokenizer.from_file(str(TOKENIZER / "tokenizer.json")))


def _parameters(network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield module, name, parameter


def _drawn(module: nn.Module, name: str, shape: torch.Size) -> torch.Tensor:
    """Draw weights without zero biases or unit norms; scores and logits are of a few units."""
    noise = torch.randn(shape)
    if isinstance(module, nn.Embedding):
        return noise
    if "Norm" not in type(module).__name__ or name == "bias":
        return 0.2 * noise
    return 0.3 * noise if type(module).__name__.startswith(LESS_ONE) else 1 + 0.3 * noise
