"""Create the models of the benchmarks: real architectures and sizes, with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, and the lengths in tokens of the prompts that it is measured with."""

    name: str
    layers: int
    width: int
    heads: int
    vocab: int
    prompt: int
    long_prompt: int
    gated_width: int | None = None
    kv_heads: int | None = None
    tied: bool = False

    def tokens(self, length: int) -> tuple[int, ...]:
        """Return a prompt of ids that are spread over the vocabulary."""
        return tuple(self.vocab * (2 * i + 1) // (2 * length) for i in range(length))


GPT2_SMALL = Shape("GPT-2 small", 12, 768, 12, 50_257, prompt=16, long_prompt=128)
SMOLLM2_135M = Shape(
    "SmolLM2-135M", 30, 576, 9, 49_152, 16, 128, gated_width=1536, kv_heads=3, tied=True
)
LLAMA_2_7B = Shape("Llama-2-7B", 32, 4096, 32, 32_000, 32, 128, gated_width=11_008)
LLAMA_1B = Shape(
    "Llama-3.2-1B", 16, 2048, 32, 128_256, 32, 128, gated_width=8192, kv_heads=8, tied=True
)
LLAMA_SMALL = Shape("small Llama", 4, 64, 8, 2_000, 8, 12, gated_width=128, kv_heads=4)
# As many layers, heads and neurons as a large model, in a width that takes no time to compute.
NARROW = Shape("narrow Llama", 32, 64, 32, 500, 16, 32, gated_width=256, kv_heads=8)
TINY = Shape("tiny GPT-2", 2, 32, 4, 2_000, prompt=6, long_prompt=10)


def build(shape: Shape, folder: Path, data_type: torch.dtype = torch.float32) -> Path:
    """Return the model's folder in `folder`, for `--model`; create it if it does not exist."""
    name = f"{shape.name} {data_type}".lower().replace(" ", "-")
    path = folder / name
    if not (path / "tokenizer.json").is_file():
        torch.manual_seed(0)
        _network(shape, data_type).save_pretrained(path)
        _tokenizer(shape.vocab).save_pretrained(path)
    return path


def _network(shape: Shape, data_type: torch.dtype) -> PreTrainedModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        network: Any = AutoModelForCausalLM.from_config(_config(shape), dtype=data_type)
    made: PreTrainedModel = network
    return made


def _config(shape: Shape) -> PreTrainedConfig:
    if shape.gated_width is None:
        return GPT2Config(
            vocab_size=shape.vocab,
            n_layer=shape.layers,
            n_embd=shape.width,
            n_head=shape.heads,
            bos_token_id=0,
            eos_token_id=0,
        )
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.gated_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        bos_token_id=0,
        eos_token_id=0,
    )


def _tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))  # noqa: S106
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)
