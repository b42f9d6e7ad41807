"""Models with the depth and vocabulary of real ones, but narrow, so that they run quickly."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

LAYERS, VOCABULARY = 12, 50_257
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# Texts that could break a page: markup, right-to-left, zero-width, joined emoji, controls.
HOSTILE = [
    "<b>bold</b>",
    "<script>alert(1)</script>",
    "&amp;&lt;",
    '"onload="x',
    "مرحبا",
    "\u202eover",
    "zero\u200bwidth",
    "👩🏽‍🚀",
    "\n\t",
    "日本",
    "\u0301",
    "</script>",
]


def random_gpt2(folder: Path, layers: int = LAYERS, positions: int = 128) -> Path:
    """Save a GPT-2 with a tokenizer of made-up words, including hostile ones."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_layer=layers, n_embd=48, n_head=12, n_positions=positions
    )
    torch.manual_seed(0)
    return _saved(GPT2LMHeadModel(config), "transformer.h", folder)


def random_mixtral(folder: Path) -> Path:
    """Save a mixture of four experts, two per position, with the same tokenizer."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=3,
        hidden_size=48,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    return _saved(MixtralForCausalLM(config), "model.layers", folder)


def _saved(model: PreTrainedModel, blocks: str, folder: Path) -> Path:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and name.startswith(blocks):
                parameter.mul_(8)  # else every block does next to nothing
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def _tokenizer() -> Tokenizer:
    """Return byte-level BPE with all bytes, and with the words by merges from the left."""
    drawn = random.Random(0)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    entries = {entry: i for i, entry in enumerate(sorted(split.alphabet()))}
    merges: list[tuple[str, str]] = []
    words = iter(HOSTILE)
    while len(entries) < VOCABULARY:
        word = next(words, None) or " " + "".join(drawn.choices("aeioulnrst", k=7))
        written = split.pre_tokenize_str(word)[0][0]
        for end in range(1, len(written)):
            if written[: end + 1] not in entries and len(entries) < VOCABULARY:
                entries[written[: end + 1]] = len(entries)
                merges.append((written[:end], written[end]))
    tokenizer = Tokenizer(models.BPE(entries, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
