"""Tiny random models of every family and shape that the numerical tests compare.

`load_example_in` loads each one three times: in the server, in plain Hugging Face and in the
reference.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    PretrainedConfig,
)

from januslens_server.models.loader import ModelSource, load
from januslens_server.models.resident import ResidentModel
from tests.reference.model import ReferenceModel, reference_of

VOCABULARY = 1000
CONTEXT = 16
TOKENIZER = Path(__file__).parents[1] / "numerics" / "goldens" / "tokenizer"


@dataclass(frozen=True)
class Example:
    """A named configuration, the seed of its weights, and the changes of these weights."""

    name: str
    config: Callable[[], PretrainedConfig]
    seed: int
    change: Callable[[Any], None] | None = None

    def build(self) -> Any:
        """Build a float32 model with eager attention; no bias is zero and no norm weight is one."""
        torch.manual_seed(self.seed)
        model: Any = AutoModelForCausalLM.from_config(self.config(), attn_implementation="eager")
        for name, parameter in model.named_parameters():
            is_norm = "ln_" in name or "norm" in name
            noise = torch.randn(parameter.shape)
            with torch.no_grad():
                if name.endswith("bias"):
                    parameter.copy_(0.2 * noise)
                else:
                    parameter.copy_(1 + 0.3 * noise if is_norm else 0.2 * noise)
        if self.change is not None:
            self.change(model)
        return model.eval()

    def save(self, folder: Path) -> Path:
        """Write the model as a model folder, with a tokenizer of as many ids."""
        target = folder / self.name
        self.build().save_pretrained(target)
        for file in TOKENIZER.iterdir():
            shutil.copy(file, target)
        return target


def prompt(name: str, length: int) -> list[int]:
    """Return token ids that differ between examples."""
    random = torch.Generator().manual_seed(100 + EXAMPLES[name].seed)
    return torch.randint(1, VOCABULARY, (length,), generator=random).tolist()


def gpt2(**changes: Any) -> Callable[[], PretrainedConfig]:
    sizes: dict[str, Any] = {"n_embd": 48, "n_head": 4, "n_layer": 3, "n_positions": CONTEXT}
    return lambda: GPT2Config(**sizes | _common() | changes)


def gpt_neo(**changes: Any) -> Callable[[], PretrainedConfig]:
    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "num_heads": 4,
        "num_layers": 3,
        "attention_types": [[["local", "global", "local"], 1]],
        "window_size": 4,
        "max_position_embeddings": CONTEXT,
    }
    return lambda: GPTNeoConfig(**sizes | _common() | changes)


def gptj(**changes: Any) -> Callable[[], PretrainedConfig]:
    sizes: dict[str, Any] = {
        "n_embd": 48,
        "n_head": 3,
        "n_layer": 3,
        "rotary_dim": 6,
        "n_positions": CONTEXT,
        "tie_word_embeddings": False,
    }
    return lambda: GPTJConfig(**sizes | _common() | changes)


def llama(**changes: Any) -> Callable[[], PretrainedConfig]:
    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "intermediate_size": 80,
        "max_position_embeddings": CONTEXT,
    }
    return lambda: LlamaConfig(**sizes | _common() | changes)


def _common() -> dict[str, Any]:
    dropouts = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "embed_dropout")
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return {"vocab_size": VOCABULARY} | special | dict.fromkeys(dropouts, 0.0)


def silence(model: Any) -> None:
    """Make layer 1's attention write nothing, and set its MLP's bias to zero."""
    block = model.transformer.h[1]
    with torch.no_grad():
        for parameter in (block.attn.c_proj.weight, block.attn.c_proj.bias, block.mlp.c_proj.bias):
            parameter.zero_()


_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 4,
}

EXAMPLES = {
    example.name: example
    for example in (
        Example("gpt2", gpt2(), seed=1),
        Example(
            "gpt2_inverse_layer",
            gpt2(n_head=2, n_inner=70, scale_attn_by_inverse_layer_idx=True),
            seed=2,
        ),
        Example(
            "gpt2_relu_untied",
            gpt2(n_head=6, n_inner=100, activation_function="relu", tie_word_embeddings=False),
            seed=3,
        ),
        Example("gpt2_silent", gpt2(), seed=10, change=silence),
        Example("gpt_neo", gpt_neo(), seed=4),
        Example("gptj", gptj(), seed=5),
        Example("llama", llama(), seed=6),
        Example("llama_grouped", llama(num_key_value_heads=2), seed=7),
        Example(
            "llama_wide_heads",
            llama(num_key_value_heads=1, head_dim=20, attention_bias=True, mlp_bias=True),
            seed=8,
        ),
        Example("llama_yarn", llama(num_key_value_heads=2, rope_parameters=_YARN), seed=9),
    )
}


@dataclass(frozen=True)
class Loaded:
    """One model, loaded three times; `network` is a separate instance with eager attention."""

    resident: ResidentModel
    network: Any
    reference: ReferenceModel


LoadExample = Callable[[str], Loaded]


def load_example_in(folder: Path, name: str) -> Loaded:
    """Save the example as a model folder, and load it as the server does."""
    example = EXAMPLES[name]
    resident = load(ModelSource(name, str(example.save(folder))))
    network = example.build()
    return Loaded(resident, network, reference_of(network))
